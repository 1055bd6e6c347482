//! stand-in
use super::{Format, dequantize_row};
use crate::{Cpu, Phase, Result, Workspace};
/// stand-in
#[derive(Debug)]
pub struct Matrix<'a> { format: Format, out: usize, inn: usize, bytes: &'a [u8] }
impl<'a> Matrix<'a> {
    /// stand-in
    pub fn new(format: Format, out: usize, inn: usize, bytes: &'a [u8]) -> Result<Self> {
        Ok(Matrix { format, out, inn, bytes })
    }
}
/// stand-in
pub fn project(m: &Matrix<'_>, x: &[f32], y: &mut [f32], _p: Phase, _c: Cpu, _w: &mut Workspace) -> Result<()> {
    use rayon::prelude::*;
    let rb = m.format.row_bytes(m.inn).unwrap();
    let rows = x.len() / m.inn;
    struct P(*mut f32);
    unsafe impl Sync for P {}
    let p = P(y.as_mut_ptr());
    let p = &p;
    (0..m.out).into_par_iter().for_each_init(|| vec![0.0f32; m.inn], |w, o| {
        dequantize_row(m.format, &m.bytes[o * rb..(o + 1) * rb], w).unwrap();
        for r in 0..rows {
            let mut acc = [0.0f32; 16];
            let x = &x[r * m.inn..(r + 1) * m.inn];
            let (xc, xr) = x.as_chunks::<16>();
            let (wc, wr) = w.as_chunks::<16>();
            for (a, b) in xc.iter().zip(wc) { for i in 0..16 { acc[i] += a[i] * b[i]; } }
            let mut s: f32 = acc.iter().sum();
            for (a, b) in xr.iter().zip(wr) { s += a * b; }
            unsafe { *{ p }.0.add(r * m.out + o) = s };
        }
    });
    Ok(())
}
