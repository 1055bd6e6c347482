//! How far FAVOR+ is from exact softmax attention, by number and kind of random features: a picture.
//!
//! ```text
//! cargo run --release -p foveal --example favor_error > docs/pictures/favor-error.svg
//! ```
//!
//! Root of the mean square error of 32 queries over 32 keys of 16 numbers, and of 100 draws; the dashed line falls as
//! m^(−1/2). Figures go to standard error.

use foveal::linear::{Draw, Favor, RandomFeatures, Recurrent, Tokens};
use foveal::{Attention, Cpu, Shape, Tensor};

const DIM: usize = 16;
const DRAWS: u64 = 100;
const COUNTS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];
const SIZE: (f64, f64) = (640.0, 400.0);
/// Left, top, right, bottom edge of the drawing.
const FRAME: [f64; 4] = [70.0, 60.0, 620.0, 350.0];

fn main() -> foveal::Result<()> {
    let kinds = [(Draw::Independent, "independent (iid)"), (Draw::Orthogonal, "orthogonal")];
    let mut lines = vec![];
    for (draw, name) in kinds {
        let errors = COUNTS.iter().map(|&count| error(draw, count));
        let errors: Vec<f64> = errors.collect::<foveal::Result<_>>()?;
        eprintln!("{name}: {:?}", COUNTS.iter().zip(&errors).collect::<Vec<_>>());
        lines.push((name, errors));
    }
    print!("{}", picture(&lines));
    Ok(())
}

/// The root of the mean square error of estimated attention.
fn error(draw: Draw, count: usize) -> foveal::Result<f64> {
    let shape = Shape { batch: 1, seq: 32, heads: 1, dim: DIM };
    let mut seed = 1u64;
    let mut numbers = |scale: f32| {
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            scale * ((seed >> 40) as f32 / 8_388_608.0 - 1.0)
        };
        Tensor::from_vec((0..32 * DIM).map(|_| next()).collect(), shape)
    };
    let (q, k, v) = (numbers(0.8)?, numbers(0.8)?, numbers(1.0)?);
    let exact = Attention::new().forward(q.view(), k.view(), v.view())?.out;
    let tokens = Tokens::new(q.view(), k.view(), v.view());
    let mut sum = 0.0;
    for seed in 0..DRAWS {
        let features = RandomFeatures::new(draw, count, DIM, seed)?;
        let recurrent = Recurrent::new(Favor::new(features)).cpu(Cpu::detect()?);
        let mut state = recurrent.state(&tokens)?;
        let out = recurrent.forward_bidirectional(&tokens, &mut state)?;
        let pairs = out.as_slice().iter().zip(exact.as_slice());
        sum += pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    }
    Ok((sum / (DRAWS as f64 * exact.as_slice().len() as f64)).sqrt())
}

/// Both axes are logarithmic.
fn picture(lines: &[(&str, Vec<f64>)]) -> String {
    let [left, top, right, bottom] = FRAME;
    let all = lines.iter().flat_map(|(_, errors)| errors);
    let most = all.clone().copied().fold(0.0, f64::max).log2().ceil();
    let least = all.copied().fold(f64::INFINITY, f64::min).log2().floor();
    let last = COUNTS.len() as f64 - 1.0;
    let x = |n: f64| left + (right - left) * n / last;
    let y = |error: f64| top + (bottom - top) * (most - error.log2()) / (most - least);
    let path = |points: &[(f64, f64)]| {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        format!("M{}", points.join("L"))
    };
    let (width, height) = SIZE;
    let title = "Error of FAVOR+ against exact softmax attention";
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n\
         <style>text {{ font: 12px system-ui, sans-serif; fill: #24292f }} .big {{ font-size: 15px; font-weight: 600 }} \
         .page {{ fill: #ffffff }} .grid {{ stroke: #d8dee4 }} .l {{ fill: none; stroke-width: 2 }} .end {{ text-anchor: end }} \
         .mid {{ text-anchor: middle }} .c0 {{ stroke: #e4572e }} .c1 {{ stroke: #2e86ab }} \
         .even {{ stroke: #57606a; stroke-dasharray: 4 3 }} @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} \
         .page {{ fill: #0d1117 }} .grid {{ stroke: #30363d }} .even {{ stroke: #9da7b3 }} }}</style>\n\
         <title>{title}</title>\n<rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n\
         <text class=\"big\" x=\"14\" y=\"24\">{title}</text>\n"
    );
    for (n, (name, _)) in lines.iter().enumerate() {
        let at = 14.0 + 170.0 * n as f64;
        svg += &format!(
            "<path class=\"l c{n}\" d=\"M{at} 42h22\"/><text x=\"{}\" y=\"46\">{name}</text>\n",
            at + 28.0
        );
    }
    svg += "<path class=\"l even\" d=\"M354 42h22\"/><text x=\"382\" y=\"46\">as m^(−1/2)</text>\n";
    for power in least as i32..=most as i32 {
        let at = y(f64::from(power).exp2());
        svg += &format!(
            "<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/><text class=\"end\" x=\"{}\" y=\"{:.1}\">{:.4}</text>\n",
            left - 8.0,
            at + 4.0,
            f64::from(power).exp2()
        );
    }
    for (n, count) in COUNTS.iter().enumerate() {
        svg += &format!(
            "<text class=\"mid\" x=\"{:.1}\" y=\"{}\">{count}</text>\n",
            x(n as f64),
            bottom + 20.0
        );
    }
    svg += &format!(
        "<text class=\"mid\" x=\"{}\" y=\"{}\">m, random features</text>\n",
        (left + right) / 2.0,
        bottom + 40.0
    );
    let start = lines[0].1[0];
    let even = [(x(0.0), y(start)), (x(last), y(start * (-last / 2.0).exp2()))];
    svg += &format!("<path class=\"l even\" d=\"{}\"/>\n", path(&even));
    for (n, (_, errors)) in lines.iter().enumerate() {
        let points: Vec<_> = errors.iter().enumerate().map(|(n, &e)| (x(n as f64), y(e))).collect();
        svg += &format!("<path class=\"l c{n}\" d=\"{}\"/>\n", path(&points));
    }
    svg + "</svg>\n"
}
