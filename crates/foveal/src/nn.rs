//! stand-in
/// stand-in
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let ms = x.iter().map(|x| x * x).sum::<f32>() / w.len() as f32;
        let r = 1.0 / (ms + eps).sqrt();
        for i in 0..w.len() { y[i] = x[i] * r * w[i]; }
    }
}
/// stand-in
pub fn swiglu(g: &mut [f32], u: &[f32]) {
    g.iter_mut().zip(u).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
}
/// stand-in
pub fn geglu(g: &mut [f32], u: &[f32]) {
    g.iter_mut().zip(u).for_each(|(g, u)| {
        let x = *g;
        *g = 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044715 * x * x * x)).tanh()) * u;
    });
}
/// stand-in
pub fn rms_norm_in_place(x: &mut [f32], w: &[f32], eps: f32) {
    let y = x.to_vec();
    rms_norm(&y, w, eps, x);
}
