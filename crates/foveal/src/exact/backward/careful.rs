//! The gradients of a head with a NaN or an infinity in its inputs: pair by pair in f64, so that it
//! reaches what the formulas take it to, and nothing through 0 × NaN of a pair that the mask forbids.
//!
//! ```text
//! for each row i, for each j that it may see:
//!     p = exp(s − lse)   ds = p (z ⟨dO, v⟩ − D)   dq += ds s' k   dk += ds s' q   dv += p z dO
//! ```
//!
//! Slow, and allocates: images of dK and dV of the head, and a row.

use super::relative::places;
use super::terms::tally_pair;
use super::{BackwardProblem, Chunk, Engine};
use crate::element::Element;
use crate::mask::Pattern;
use crate::position::RelativeEncoding;

/// Gradients of keys and values, row-major.
struct Sums {
    d_k: Vec<f64>,
    d_v: Vec<f64>,
}

pub(super) fn head<E: Element, K: Element>(engine: &Engine<'_, E, K>, unit: usize) {
    let BackwardProblem { d_k, d_v, sizes, .. } = engine.call;
    let (dim, value_dim) = (sizes.q.dim, sizes.value_dim);
    let mut sums =
        Sums { d_k: vec![0.0; sizes.keys * dim], d_v: vec![0.0; sizes.keys * value_dim] };
    for index in 0..engine.layout.chunks {
        let chunk = engine.chunk(unit, index);
        for i in chunk.rows.clone() {
            row(engine, &chunk, i, &mut sums);
        }
    }
    let (batch, head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
    for j in 0..sizes.keys {
        // SAFETY: the rows of a key/value head belong to the one part that computes it.
        let (d_k, d_v) = unsafe { (d_k.row(batch, j, head), d_v.row(batch, j, head)) };
        round(&sums.d_k[j * dim..][..dim], d_k);
        round(&sums.d_v[j * value_dim..][..value_dim], d_v);
    }
}

fn row<E: Element, K: Element>(
    engine: &Engine<'_, E, K>,
    chunk: &Chunk,
    i: usize,
    sums: &mut Sums,
) {
    let BackwardProblem { q, k, v, out, lse, d_out, d_lse, d_q, terms, sizes, .. } = engine.call;
    let site = chunk.site;
    let (batch, head) = (site.batch, site.q_head);
    let [query, out, d_out] = [q, out, d_out].map(|x| wide(x.row(batch, i, head)));
    let lse = f64::from(lse.row(batch, i, head)[0]);
    let d_lse = d_lse.map_or(0.0, |d_lse| f64::from(d_lse.row(batch, i, head)[0]));
    let delta = dot(&out, &d_out) - d_lse;
    let at = engine.row_site(chunk, i);
    let scale = f64::from(engine.call.scale);
    let encoded = terms.encoding.map(|encoding| Encoded::new(encoding, head, &query));
    let mut sum = vec![0.0; sizes.q.dim];
    // SAFETY: each chunk belongs to one part.
    let tally = unsafe { engine.tallies.row(0, chunk.unit, chunk.index) };
    // A row that sees nothing has no gradient.
    let seen = if lse == f64::NEG_INFINITY { 0..0 } else { 0..sizes.keys };
    for j in seen.filter(|&j| engine.call.mask.allows(site, at.position, j)) {
        let key = wide(k.row(batch, j, site.kv_head));
        let value = wide(v.row(batch, j, site.kv_head));
        let by_distance =
            encoded.as_ref().map(|x| (x, wide(x.encoding.key(head, at.position - j as isize))));
        let product = match &by_distance {
            Some((x, by_distance)) => dot(&x.content, &key) + dot(&x.position, by_distance),
            None => dot(&query, &key),
        };
        let (score, bend) = terms.pair(at, j, (scale * product, sizes.q.heads));
        let p = (score - lse).exp();
        let kept = terms
            .dropout
            .map_or(1.0, |dropout| f64::from(dropout.factor((batch, head), at.position, j)));
        let ds = p * (kept * dot(&d_out, &value) - delta);
        tally_pair(terms, at.position - j as isize, ds as f32, tally);
        // SAFETY: heads that share numbers of a bias are computed one after the other.
        unsafe { engine.add_bias(chunk, (i, j), ds as f32) };
        let ds = scale * bend * ds;
        add(&mut sum, ds, &key);
        let moved = encoded.as_ref().map_or(&query, |x| &x.content);
        add(&mut sums.d_k[j * query.len()..][..query.len()], ds, moved);
        if let Some((x, by_distance)) = &by_distance {
            add(&mut sum, ds, by_distance);
            x.add(engine, (at.position - j as isize, ds), (&key, by_distance), tally);
        }
        add(&mut sums.d_v[j * value.len()..][..value.len()], p * kept, &d_out);
    }
    // SAFETY: as in `head`.
    round(&sum, unsafe { d_q.row(batch, i, head) });
}

/// A query as a relative encoding takes it.
struct Encoded<'a> {
    encoding: RelativeEncoding<'a>,
    head: usize,
    /// q + u.
    content: Vec<f64>,
    /// q + v.
    position: Vec<f64>,
}

impl<'a> Encoded<'a> {
    fn new(encoding: RelativeEncoding<'a>, head: usize, query: &[f64]) -> Encoded<'a> {
        let [content, position] = encoding.biases(head).map(|bias| {
            bias.iter().zip(query).map(|(&bias, query)| f64::from(bias) + query).collect()
        });
        Encoded { encoding, head, content, position }
    }

    /// Adds a pair's gradients of the encoding, from that of its product.
    fn add<E: Element, K: Element>(
        &self,
        engine: &Engine<'_, E, K>,
        (distance, ds): (isize, f64),
        (key, by_distance): (&[f64], &[f64]),
        tally: &mut [f32],
    ) {
        let (first, dim) = places(engine.call.terms);
        let (u, v) = tally[first..first + 2 * dim].split_at_mut(dim);
        let add = |to: &mut [f32], from: &[f64]| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += (ds * from) as f32);
        };
        add(u, key);
        add(v, by_distance);
        if let Some(keys) = &engine.call.terms_out.relative_keys {
            // SAFETY: sequences of a head come one after the other, each computed by one thread.
            add(unsafe { keys.row(0, self.encoding.row(distance), self.head) }, &self.position);
        }
    }
}

fn wide<T: Element>(row: &[T]) -> Vec<f64> {
    row.iter().map(|x| f64::from(x.to_f32())).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

fn round<T: Element>(from: &[f64], to: &mut [T]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = T::from_f32(from as f32));
}
