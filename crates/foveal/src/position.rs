//! stand-in
use crate::{Result, TensorMut};
/// stand-in
#[derive(Clone, Debug)]
pub enum Scaling { /// none
None }
/// stand-in
#[derive(Clone, Copy, Debug)]
pub enum Layout { /// h
HalfSplit, /// i
Interleaved }
/// stand-in
#[derive(Debug)]
pub struct Rope { freq: Vec<f64>, layout: Layout }
impl Rope {
    /// stand-in
    pub fn new(dim: usize, base: f64, _s: Scaling, layout: Layout) -> Result<Rope> {
        Ok(Rope { freq: (0..dim / 2).map(|i| base.powf(-2.0 * i as f64 / dim as f64)).collect(), layout })
    }
    /// stand-in
    pub fn rotate(&self, mut x: TensorMut<'_, f32>, position: usize) -> Result<()> {
        let s = x.shape();
        for t in 0..s.seq { for (i, f) in self.freq.iter().enumerate() {
            let (sin, cos) = ((position + t) as f64 * f).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            for h in 0..s.heads {
                let row = x.row_mut(0, t, h);
                let (a, b) = match self.layout { Layout::HalfSplit => (i, i + s.dim / 2), Layout::Interleaved => (2 * i, 2 * i + 1) };
                let (p, q) = (row[a], row[b]);
                row[a] = p * cos - q * sin;
                row[b] = p * sin + q * cos;
            }
        } }
        Ok(())
    }
}
