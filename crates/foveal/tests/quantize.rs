//! Rows to their stored form: the error against plain rounding, odd rows, and what is refused.

use foveal::projection::{Format, QuantizeError, RowError, dequantize_row, quantize_row};
use half::{bf16, f16};

/// splitmix64, summed up to something like a normal distribution.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut unit = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut normal = || (0..6).map(|_| unit()).sum::<f32>();
    (0..count).map(|_| 0.05 * normal()).collect()
}

fn there_and_back(format: Format, x: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0xa5; format.row_bytes(x.len()).unwrap()];
    quantize_row(format, x, &mut bytes).unwrap();
    let mut back = vec![f32::NAN; x.len()];
    dequantize_row(format, &bytes, &mut back).unwrap();
    back
}

fn error(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum()
}

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// Plain rounding: the extremes of a block (or run) to the extremes of the codes.
fn plain(format: Format, x: &[f32]) -> Vec<f32> {
    let symmetric = |x: &[f32], d: f32, low: f32, high: f32| -> Vec<f32> {
        let code = |x: f32| if d == 0.0 { 0.0 } else { (x / d).round().clamp(low, high) };
        x.iter().map(|&x| d * code(x)).collect()
    };
    let affine = |x: &[f32], d: f32, m: f32, high: f32| -> Vec<f32> {
        let code = |x: f32| if d == 0.0 { 0.0 } else { ((x - m) / d).round().clamp(0.0, high) };
        x.iter().map(|&x| d * code(x) + m).collect()
    };
    let extreme = |x: &[f32]| x.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    let range = |x: &[f32], most: f32| {
        let low = x.iter().copied().fold(most, f32::min);
        (low, x.iter().copied().fold(f32::NEG_INFINITY, f32::max) - low)
    };
    let step = |x: f32, unit: f32| if unit == 0.0 { 0.0 } else { (x / unit).round() };
    let blocks = x.chunks(format.block_len());
    let block = |x: &[f32]| match format {
        Format::Q8_0 => symmetric(x, half(extreme(x) / 127.0), -127.0, 127.0),
        Format::Q4_0 => symmetric(x, half(extreme(x) / -8.0), -8.0, 7.0),
        Format::Q5_0 => symmetric(x, half(extreme(x) / -16.0), -16.0, 15.0),
        Format::Q4_1 | Format::Q5_1 => {
            let high = if format == Format::Q4_1 { 15.0 } else { 31.0 };
            let (low, width) = range(x, f32::MAX);
            affine(x, half(width / high), half(low), high)
        }
        Format::Q4_K | Format::Q5_K => {
            let high = if format == Format::Q4_K { 15.0 } else { 31.0 };
            let runs: Vec<_> = x.chunks(32).map(|run| range(run, 0.0)).collect();
            let d = half(runs.iter().map(|run| run.1 / high).fold(0.0, f32::max) / 63.0);
            let m = half(runs.iter().map(|run| -run.0).fold(0.0, f32::max) / 63.0);
            let run = |(x, (low, width)): (&[f32], &(f32, f32))| {
                affine(x, d * step(width / high, d), -m * step(-low, m), high)
            };
            x.chunks(32).zip(&runs).flat_map(run).collect()
        }
        Format::Q6_K => {
            let d = half(
                x.chunks(16).map(extreme).fold(0.0, |a: f32, b| a.max(b.abs())) / 32.0 / 127.0,
            );
            let run = |x: &[f32]| symmetric(x, d * step(extreme(x) / -32.0, d), -32.0, 31.0);
            x.chunks(16).flat_map(run).collect()
        }
        _ => unreachable!("floats are not rounded to levels"),
    };
    blocks.flat_map(block).collect()
}

#[test]
fn the_search_beats_plain_rounding() {
    let mut x = numbers(256 * 64, 1);
    // Some outliers, and blocks that are not around zero.
    x.iter_mut().step_by(97).for_each(|x| *x *= 4.0);
    x[256 * 40..].iter_mut().for_each(|x| *x += 0.1);
    for (format, most) in [
        (Format::Q8_0, 0.92),
        (Format::Q4_0, 0.92),
        (Format::Q4_1, 0.88),
        (Format::Q5_0, 0.92),
        (Format::Q5_1, 0.88),
        (Format::Q4_K, 0.88),
        (Format::Q5_K, 0.88),
        (Format::Q6_K, 0.88),
    ] {
        let (found, simple) = (there_and_back(format, &x), plain(format, &x));
        let ratio = error(&x, &found) / error(&x, &simple);
        println!("{format}: squared error {ratio:.3} of plain rounding");
        assert!(ratio <= most, "{format}: {ratio}");
    }
}

#[test]
fn more_bits_are_better() {
    let x = numbers(256 * 16, 2);
    let error = |format| error(&x, &there_and_back(format, &x));
    let formats = [Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0];
    assert!(formats.windows(2).all(|pair| error(pair[1]) < error(pair[0])));
    let formats = [Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::Q8_0, Format::F16];
    assert!(formats.windows(2).all(|pair| error(pair[1]) < error(pair[0])));
    assert!(error(Format::BF16) < error(Format::Q8_0));
    assert_eq!(error(Format::F32), 0.0);
}

#[test]
fn floats_are_rounded_once() {
    let x = numbers(100, 3);
    let expected: Vec<f32> = x.iter().map(|&x| half(x)).collect();
    assert_eq!(there_and_back(Format::F16, &x), expected);
    let expected: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    assert_eq!(there_and_back(Format::BF16, &x), expected);
}

/// The largest error that rounding to the levels of a block with these extremes may have.
fn bound(format: Format, x: &[f32]) -> f32 {
    let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
    let steps = match format {
        Format::Q8_0 => 127.0,
        Format::Q4_0 => 7.0,
        Format::Q5_0 => 15.0,
        Format::Q4_1 | Format::Q4_K => 7.0,
        Format::Q5_1 | Format::Q5_K => 15.0,
        _ => 31.0,
    };
    // What the whole numbers of a format multiply an f16 of at most half its smallest step off.
    let multiples = match format {
        Format::Q4_K => 63.0 * 15.0,
        Format::Q5_K => 63.0 * 31.0,
        Format::Q6_K => 128.0 * 32.0,
        _ => 128.0,
    };
    most / steps * 1.2 + multiples * 2f32.powi(-24)
}

#[test]
fn odd_rows_stay_within_their_levels() {
    let mut rows = vec![
        vec![0.0; 256],
        vec![-0.0; 256],
        vec![1.5; 256],
        vec![-1.5; 256],
        vec![65504.0; 256],
        vec![-65504.0; 256],
        vec![f32::from_bits(1); 256],
        vec![1e-12; 256],
        (0..256).map(|i| i as f32).collect(),
        (0..256).map(|i| if i == 77 { -30000.0 } else { 0.0 }).collect(),
        (0..256).map(|i| if i % 2 == 0 { 65504.0 } else { -65504.0 }).collect(),
        (0..256).map(|i| 1.0 + 1e-6 * i as f32).collect(),
        (0..256).map(|i| 10f32.powi(i / 8 - 28)).collect(),
    ];
    rows.extend((0..20).map(|n| numbers(256, 100 + n)));
    for format in Format::ALL {
        for row in &rows {
            let back = there_and_back(format, row);
            for (block, found) in
                row.chunks(format.block_len()).zip(back.chunks(format.block_len()))
            {
                let bound = bound(format, block);
                for (x, y) in block.iter().zip(found) {
                    assert!((x - y).abs() <= bound, "{format}: {y} for {x}, bound {bound}");
                }
            }
        }
    }
}

#[test]
fn blocks_do_not_know_each_other() {
    let x = numbers(256 * 3, 4);
    for format in Format::ALL {
        let mut whole = vec![0; format.row_bytes(x.len()).unwrap()];
        quantize_row(format, &x, &mut whole).unwrap();
        let mut parts = vec![];
        for block in x.chunks(format.block_len()) {
            let mut bytes = vec![0xff; format.block_bytes()];
            quantize_row(format, block, &mut bytes).unwrap();
            parts.extend(bytes);
        }
        assert!(parts == whole, "{format}");
    }
}

#[test]
fn what_has_no_stored_form_is_refused() {
    for format in Format::ALL {
        let len = format.block_len();
        let mut bytes = vec![7; format.block_bytes()];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38] {
            if bad == 1e38 && matches!(format, Format::F32 | Format::BF16) {
                continue;
            }
            let mut x = vec![1.0; len];
            x[len - 1] = bad;
            let refused = quantize_row(format, &x, &mut bytes);
            assert!(
                matches!(refused, Err(QuantizeError::Range { at, .. }) if at == len - 1),
                "{format} {bad}: {refused:?}"
            );
        }
        let short = quantize_row(format, &vec![1.0; len], &mut bytes[1..]);
        assert!(matches!(short, Err(QuantizeError::Row(RowError::Length { .. }))));
        if len > 1 {
            let partial = quantize_row(format, &vec![1.0; len - 1], &mut bytes);
            assert!(matches!(partial, Err(QuantizeError::Row(RowError::PartialBlock { .. }))));
        }
        assert!(bytes.iter().all(|&byte| byte == 7), "{format}: nothing was written");
    }
}
