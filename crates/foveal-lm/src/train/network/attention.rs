//! A layer's token mixing: projections around its sections.
//!
//! ```text
//! q = rope(norm(x Wqᵀ + bq))   k = rope(norm(x Wkᵀ + bk))   v = x Wvᵀ + bv
//! y = concat_s(section_s(q_s, k_s, v_s)) Woᵀ + bo
//! ```
//!
//! Kept for backward: q, k and v, what sections gave, and q and k before their norms; not x, which the caller has.

use foveal::position::RopeTable;
use foveal::{Dropout, Gradient, Shape, Strides, TensorMut, TensorRef};

use super::carried::SectionCarried;
use super::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection,
};
use super::sections::{self, SectionPlace};
use super::tools::{Normed, Projected, Ranges, Tools};
use super::{Objective, place_seed};
use crate::Error;
use crate::config::ModelConfig;
use crate::linear::forward_together;

/// What a layer's attention computes.
#[derive(Debug)]
pub(super) struct AttentionLayer {
    query: Projected,
    key: Projected,
    value: Projected,
    output: Projected,
    /// Norms of queries and of keys.
    norms: Option<[Normed; 2]>,
    sections: Vec<Part>,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    rope: usize,
}

/// Neighbouring heads.
#[derive(Debug)]
struct Part {
    /// The first query head, and how many there are.
    heads: (usize, usize),
    kv_heads: (usize, usize),
    section: Box<dyn TrainedSection>,
}

/// The tokens of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens<'a> {
    pub(super) parameters: &'a [f32],
    pub(super) sequences: usize,
    /// Of each sequence.
    pub(super) tokens: usize,
    /// The position of the first.
    pub(super) start: usize,
    /// Of the model's rotary embeddings.
    pub(super) rotations: &'a [RopeTable],
    pub(super) dropout: Option<Dropout>,
}

/// What a call leaves for backward.
#[derive(Debug, Default)]
pub(super) struct Saved {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and keys before rotation, where a section reads both.
    plain: Option<[Vec<f32>; 2]>,
    /// Queries and keys before their norms.
    unnormed: Option<[Vec<f32>; 2]>,
    mixed: Vec<f32>,
    sections: Vec<SectionSaved>,
}

impl AttentionLayer {
    pub(super) fn new(
        (config, objective): (&ModelConfig, Objective),
        ranges: &Ranges,
        (layer, rope): (usize, usize),
    ) -> Result<AttentionLayer, Error> {
        let (width, attention) = (config.width, config.attention);
        let (q, kv) = (attention.q_dim(), attention.kv_dim());
        let prefix = format!("model.layers.{layer}.self_attn");
        let projected = |name: &str, shape, biased| {
            Projected::new(ranges, &format!("{prefix}.{name}"), shape, biased)
        };
        let norm = |name: &str| {
            let range = super::tools::range(ranges, &format!("{prefix}.{name}.weight"))?;
            let (epsilon, offset) = (config.norm_epsilon, config.norm_offset);
            Ok::<_, Error>(Normed { range, epsilon, offset })
        };
        let norms = match attention.qk_norm {
            true => Some([norm("q_norm")?, norm("k_norm")?]),
            false => None,
        };
        Ok(AttentionLayer {
            query: projected("q_proj", [q, width], attention.qkv_bias)?,
            key: projected("k_proj", [kv, width], attention.qkv_bias)?,
            value: projected("v_proj", [kv, width], attention.qkv_bias)?,
            output: projected("o_proj", [width, q], attention.output_bias)?,
            norms,
            sections: parts((config, objective), ranges, layer)?,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            dim: attention.head_dim,
            rope,
        })
    }

    /// Sections of the layer.
    pub(super) fn sections(&self) -> usize {
        self.sections.len()
    }

    /// Mixes the normalised rows `x` into `y`.
    pub(super) fn forward(
        &self,
        (x, y): (&[f32], &mut [f32]),
        of: Tokens<'_>,
        mut carried: Option<&mut [SectionCarried]>,
        keep: bool,
        tools: &mut Tools<'_>,
    ) -> Result<Saved, Error> {
        let mut saved = self.projected(x, of, keep, tools)?;
        let (shape, strides) = self.place(of, self.heads, (0, self.heads));
        let mut mixed = tools.pool.take(saved.q.len());
        debug_assert_eq!(strides.seq * shape.seq * shape.batch, mixed.len());
        for (n, part) in self.sections.iter().enumerate() {
            let (shape, strides) = self.place(of, self.heads, part.heads);
            let first = (part.heads.0 * self.dim).min(mixed.len());
            let out = TensorMut::from_strides(&mut mixed[first..], shape, strides)?;
            let call = self.call(x, &saved, of, (n, keep))?;
            let own = carried.as_mut().and_then(|carried| carried.get_mut(n));
            saved.sections.push(part.section.forward(call, own, out, tools)?);
        }
        self.output.forward(of.parameters, &mixed, y, tools)?;
        saved.mixed = mixed;
        Ok(saved)
    }

    /// Queries, keys and values as sections read them.
    fn projected(
        &self,
        x: &[f32],
        of: Tokens<'_>,
        keep: bool,
        tools: &mut Tools<'_>,
    ) -> Result<Saved, Error> {
        let rows = of.sequences * of.tokens;
        let [mut q, mut k, mut v] = [self.heads, self.kv_heads, self.kv_heads]
            .map(|heads| tools.pool.take(rows * heads * self.dim));
        let view = |projected: &Projected| projected.view(of.parameters);
        let three = [
            (view(&self.query)?, &mut q[..]),
            (view(&self.key)?, &mut k),
            (view(&self.value)?, &mut v),
        ];
        forward_together(x, three, &mut tools.run())?;
        let mut unnormed = None;
        if let Some([query_norm, key_norm]) = &self.norms {
            let [plain_q, plain_k] = [std::mem::take(&mut q), std::mem::take(&mut k)];
            (q, k) = (tools.pool.take(plain_q.len()), tools.pool.take(plain_k.len()));
            query_norm.forward(of.parameters, &plain_q, &mut q, tools)?;
            key_norm.forward(of.parameters, &plain_k, &mut k, tools)?;
            unnormed = Some([plain_q, plain_k]);
        }
        if let Some(unnormed) = unnormed.take_if(|_| !keep) {
            unnormed.into_iter().for_each(|buffer| tools.pool.give(buffer));
        }
        let both = self.reads(Positions::Both);
        let plain = both.then(|| [tools.pool.copy(&q), tools.pool.copy(&k)]);
        let level = tools.cpu.level;
        self.each_rotated(of, [&mut q, &mut k], |table, x| Ok(table.rotate(level, x)?))?;
        Ok(Saved { q, k, v, plain, unnormed, mixed: vec![], sections: vec![] })
    }

    /// Whether a section reads queries and keys in this way.
    fn reads(&self, positions: Positions) -> bool {
        self.sections.iter().any(|part| part.section.positions() == positions)
    }

    /// Does something to the heads of queries and keys that are rotated.
    fn each_rotated(
        &self,
        of: Tokens<'_>,
        [q, k]: [&mut Vec<f32>; 2],
        rotate: impl Fn(&RopeTable, TensorMut<'_, f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let rotated = |part: &&Part| part.section.positions() != Positions::Plain;
        for part in self.sections.iter().filter(rotated) {
            for (x, heads, own) in
                [(&mut *q, self.heads, part.heads), (&mut *k, self.kv_heads, part.kv_heads)]
            {
                let (shape, strides) = self.place(of, heads, own);
                let x = x.get_mut(own.0 * self.dim..).unwrap_or(&mut []);
                rotate(&of.rotations[self.rope], TensorMut::from_strides(x, shape, strides)?)?;
            }
        }
        Ok(())
    }

    /// What section `n` sees.
    fn call<'a>(
        &'a self,
        x: &'a [f32],
        saved: &'a Saved,
        of: Tokens<'a>,
        (n, keep): (usize, bool),
    ) -> Result<SectionCall<'a>, Error> {
        let Part { heads, kv_heads, section } = &self.sections[n];
        let q = |x| self.view(x, of, self.heads, *heads);
        let kv = |x| self.view(x, of, self.kv_heads, *kv_heads);
        let plain = saved.plain.as_ref().filter(|_| section.positions() == Positions::Both);
        let plain = plain.map(|[plain_q, plain_k]| Ok::<_, Error>([q(plain_q)?, kv(plain_k)?]));
        let dropout = of
            .dropout
            .map(|Dropout { rate, seed }| Dropout { rate, seed: place_seed(seed, 16 + n as u64) });
        Ok(SectionCall {
            parameters: of.parameters,
            x,
            q: q(&saved.q)?,
            k: kv(&saved.k)?,
            v: kv(&saved.v)?,
            plain: plain.transpose()?,
            norms: self.norms.as_ref(),
            rope: of.rotations[self.rope].rope(),
            start: of.start,
            keep,
            dropout,
        })
    }

    /// From the gradient of the results to that of `x`, which is added to `d_x`.
    pub(super) fn backward(
        &self,
        (x, d_y): (&[f32], &[f32]),
        of: Tokens<'_>,
        mut saved: Saved,
        (d_x, gradients): (&mut [f32], &mut [f32]),
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let mut d_mixed = tools.pool.take(saved.mixed.len());
        let arenas = (of.parameters, &mut *gradients);
        let rows = (&saved.mixed[..], d_y);
        self.output.backward(arenas, rows, Gradient::Write(&mut d_mixed), tools)?;
        let mut d = [&saved.q, &saved.k, &saved.v].map(|x| tools.pool.take(x.len()));
        let lengths = saved.plain.as_ref().map(|plain| plain.each_ref().map(Vec::len));
        // Sections that read one of the two leave nothing here.
        let mut d_plain = lengths.map(|lengths| lengths.map(|len| tools.pool.zeros(len)));
        let own = std::mem::take(&mut saved.sections);
        for (n, section) in own.into_iter().enumerate() {
            let call = self.call(x, &saved, of, (n, true))?;
            let places = self.places(n, of, (&mut d, &mut d_plain), (d_x, gradients))?;
            let heads = self.sections[n].heads;
            let upstream = SectionUpstream {
                out: self.view(&saved.mixed, of, self.heads, heads)?,
                d_out: self.view(&d_mixed, of, self.heads, heads)?,
            };
            self.sections[n].section.backward(call, section, upstream, places, tools)?;
        }
        let [d_q, d_k, _] = &mut d;
        let level = tools.cpu.level;
        self.each_rotated(of, [d_q, d_k], |table, x| Ok(table.rotate_gradient(level, x)?))?;
        if let Some(plain) = d_plain {
            for (d, plain) in d.iter_mut().zip(plain) {
                tools.add(d, &plain)?;
                tools.pool.give(plain);
            }
        }
        self.norms_backward(of.parameters, &saved, &mut d, gradients, tools)?;
        let Saved { q, k, v, plain, unnormed, mixed, .. } = saved;
        let buffers = [q, k, v, mixed, d_mixed].into_iter();
        let rest = plain.into_iter().chain(unnormed).flatten();
        buffers.chain(rest).for_each(|buffer| tools.pool.give(buffer));
        for (projected, d) in [&self.query, &self.key, &self.value].into_iter().zip(d) {
            let arenas = (of.parameters, &mut *gradients);
            projected.backward(arenas, (x, &d), Gradient::Add(&mut *d_x), tools)?;
            tools.pool.give(d);
        }
        Ok(())
    }

    fn norms_backward(
        &self,
        parameters: &[f32],
        saved: &Saved,
        d: &mut [Vec<f32>; 3],
        gradients: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let (Some(norms), Some(unnormed)) = (&self.norms, &saved.unnormed) else { return Ok(()) };
        for ((norm, x), d) in norms.iter().zip(unnormed).zip(d) {
            let mut d_x = tools.pool.zeros(x.len());
            norm.backward((parameters, gradients), (x, d), &mut d_x, tools)?;
            tools.pool.give(std::mem::replace(d, d_x));
        }
        Ok(())
    }

    /// Where section `n` puts its gradients.
    fn places<'a>(
        &self,
        n: usize,
        of: Tokens<'_>,
        ([d_q, d_k, d_v], d_plain): (&'a mut [Vec<f32>; 3], &'a mut Option<[Vec<f32>; 2]>),
        (d_x, gradients): (&'a mut [f32], &'a mut [f32]),
    ) -> Result<SectionGradients<'a>, Error> {
        let Part { heads, kv_heads, section } = &self.sections[n];
        let q = |x| self.view_mut(x, of, self.heads, *heads);
        let kv = |x| self.view_mut(x, of, self.kv_heads, *kv_heads);
        let d_plain = d_plain.as_mut().filter(|_| section.positions() == Positions::Both);
        let d_plain = d_plain.map(|[plain_q, plain_k]| Ok::<_, Error>([q(plain_q)?, kv(plain_k)?]));
        Ok(SectionGradients {
            d_q: q(d_q)?,
            d_k: kv(d_k)?,
            d_v: kv(d_v)?,
            d_plain: d_plain.transpose()?,
            d_x,
            gradients,
        })
    }

    /// Shape and strides of some of all `heads` heads.
    fn place(&self, of: Tokens<'_>, heads: usize, (_, own): (usize, usize)) -> (Shape, Strides) {
        let (dim, seq) = (self.dim, of.tokens);
        let strides = Strides { batch: seq * heads * dim, seq: heads * dim, heads: dim };
        (Shape { batch: of.sequences, seq, heads: own, dim }, strides)
    }

    fn view<'a>(
        &self,
        x: &'a [f32],
        of: Tokens<'_>,
        heads: usize,
        own: (usize, usize),
    ) -> Result<TensorRef<'a, f32>, Error> {
        let (shape, strides) = self.place(of, heads, own);
        let x = x.get(own.0 * self.dim..).unwrap_or(&[]);
        Ok(TensorRef::from_strides(x, shape, strides)?)
    }

    fn view_mut<'a>(
        &self,
        x: &'a mut [f32],
        of: Tokens<'_>,
        heads: usize,
        own: (usize, usize),
    ) -> Result<TensorMut<'a, f32>, Error> {
        let (shape, strides) = self.place(of, heads, own);
        let x = x.get_mut(own.0 * self.dim..).unwrap_or(&mut []);
        Ok(TensorMut::from_strides(x, shape, strides)?)
    }
}

impl Saved {
    /// Gives all buffers back; those of sections are dropped.
    pub(super) fn give(self, tools: &mut Tools<'_>) {
        let Saved { q, k, v, plain, unnormed, mixed, .. } = self;
        let rest = plain.into_iter().chain(unnormed).flatten();
        [q, k, v, mixed].into_iter().chain(rest).for_each(|buffer| tools.pool.give(buffer));
    }
}

/// The sections of a layer, or its family's attention.
fn parts(
    (config, objective): (&ModelConfig, Objective),
    ranges: &Ranges,
    layer: usize,
) -> Result<Vec<Part>, Error> {
    let causal = objective == Objective::Causal;
    let attention = config.attention;
    let place = SectionPlace {
        config,
        causal,
        ranges,
        layer,
        section: 0,
        heads: attention.heads,
        kv_heads: attention.kv_heads,
    };
    let named = &config.layers[layer].sections;
    if named.is_empty() {
        let (heads, kv_heads) = ((0, attention.heads), (0, attention.kv_heads));
        return Ok(vec![Part { heads, kv_heads, section: sections::of_family(place)? }]);
    }
    crate::mixer::refuse_more(config)?;
    let (mut head, mut kv_head, mut parts) = (0, 0, vec![]);
    for (n, section) in named.iter().enumerate() {
        let (heads, kv_heads) = (section.heads, section.kv_heads);
        let place = SectionPlace { section: n, heads, kv_heads, ..place };
        parts.push(Part {
            heads: (head, heads),
            kv_heads: (kv_head, kv_heads),
            section: sections::named(section, place)?,
        });
        (head, kv_head) = (head + heads, kv_head + kv_heads);
    }
    Ok(parts)
}

impl Saved {
    /// The first place with a number that is not finite.
    pub(super) fn not_finite(&self) -> Option<&'static str> {
        let bad = |x: &[f32]| x.iter().any(|x| !x.is_finite());
        let places = [
            ("queries", &self.q),
            ("keys", &self.k),
            ("values", &self.v),
            ("what heads give", &self.mixed),
        ];
        places.into_iter().find(|(_, x)| bad(x)).map(|(place, _)| place)
    }
}
