//! Kernels of short causal convolutions along tokens, each channel for itself.
//!
//! Vectors of channels go through all tokens with the last inputs in registers. A result is one chain of additions over the
//! taps, the oldest first, wherever a sequence was cut.

use super::nn::{load, store};
use super::{Simd, dispatch, math};

/// The parameters, by channel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taps<'a> {
    /// `[kernel, channels]`, the tap of the oldest input first.
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) channels: usize,
    /// Whether results go through SiLU.
    pub(crate) silu: bool,
}

impl<'a> Taps<'a> {
    #[inline(always)]
    fn bias<S: Simd>(&self, s: S, at: usize) -> S::F {
        self.bias.map_or(s.splat(0.0), |bias| load(s, bias, at))
    }

    #[inline(always)]
    fn row(&self, rows: &'a [f32], n: usize) -> &'a [f32] {
        &rows[n * self.channels..(n + 1) * self.channels]
    }

    fn kernel(&self) -> usize {
        self.weight.len() / self.channels
    }
}

/// Runs a kernel of this many taps.
macro_rules! by_taps {
    ($kernel:expr, $call:ident ($($arg:expr),*)) => {
        match $kernel {
            2 => $call::<S, 2>($($arg),*),
            3 => $call::<S, 3>($($arg),*),
            4 => $call::<S, 4>($($arg),*),
            5 => $call::<S, 5>($($arg),*),
            6 => $call::<S, 6>($($arg),*),
            7 => $call::<S, 7>($($arg),*),
            8 => $call::<S, 8>($($arg),*),
            other => unreachable!("convolutions have 2 to 8 taps, not {other}"),
        }
    };
}

dispatch! {
    /// y of the tokens of `x`, both `[tokens, channels]`; `state`, `[kernel − 1, channels]`, are the inputs before them and
    /// become the last ones.
    pub(crate) fn convolve(taps: Taps<'_>, x: &[f32], state: &mut [f32], y: &mut [f32]) = convolve_kernel
}

#[inline(always)]
fn convolve_kernel<S: Simd>(s: S, taps: Taps<'_>, x: &[f32], state: &mut [f32], y: &mut [f32]) {
    by_taps!(taps.kernel(), convolve_taps(s, taps, x, state, y));
}

#[inline(always)]
fn convolve_taps<S: Simd, const K: usize>(
    s: S,
    taps: Taps<'_>,
    x: &[f32],
    state: &mut [f32],
    y: &mut [f32],
) {
    let channels = taps.channels;
    assert!(x.len() == y.len() && state.len() == (K - 1) * channels);
    for at in (0..channels).step_by(S::LANES) {
        let bias = taps.bias(s, at);
        let (mut weight, mut window) = ([bias; K], [bias; K]);
        for i in 0..K {
            weight[i] = load(s, taps.row(taps.weight, i), at);
        }
        for i in 0..K - 1 {
            window[i] = load(s, &state[i * channels..(i + 1) * channels], at);
        }
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
            window[K - 1] = load(s, x, at);
            let mut sum = bias;
            for i in 0..K {
                sum = s.fma(weight[i], window[i], sum);
            }
            store(s, y, at, if taps.silu { s.mul(sum, math::sigmoid(s, sum)) } else { sum });
            for i in 0..K - 1 {
                window[i] = window[i + 1];
            }
        }
        for i in 0..K - 1 {
            store(s, &mut state[i * channels..(i + 1) * channels], at, window[i]);
        }
    }
}

/// What gradients are made from and where they go.
#[derive(Debug)]
pub(crate) struct ConvolveBackward<'a> {
    pub(crate) x: &'a [f32],
    /// The inputs before `x`.
    pub(crate) initial: &'a [f32],
    pub(crate) d_y: &'a [f32],
    /// In: the gradient of the last inputs; out: that of `initial`.
    pub(crate) d_state: &'a mut [f32],
    /// Of `x`, and whether it is added.
    pub(crate) d_x: Option<(&'a mut [f32], bool)>,
    /// Is added to.
    pub(crate) d_weight: Option<&'a mut [f32]>,
    /// Is added to.
    pub(crate) d_bias: Option<&'a mut [f32]>,
}

/// Tokens whose sums are computed before they are added to later ones.
const SUMMED: usize = 64;

dispatch! {
    /// The gradients of [`convolve`].
    pub(crate) fn convolve_backward(taps: Taps<'_>, args: ConvolveBackward<'_>) = convolve_backward_kernel
}

#[inline(always)]
fn convolve_backward_kernel<S: Simd>(s: S, taps: Taps<'_>, args: ConvolveBackward<'_>) {
    let mut args = args;
    for at in (0..taps.channels).step_by(S::LANES) {
        by_taps!(taps.kernel(), channels_backward(s, taps, &mut args, at));
    }
}

/// Gradients of a vector of channels, from the last token to the first.
#[inline(always)]
fn channels_backward<S: Simd, const K: usize>(
    s: S,
    taps: Taps<'_>,
    args: &mut ConvolveBackward<'_>,
    at: usize,
) {
    let (channels, zero) = (taps.channels, s.splat(0.0));
    let tokens = args.x.len() / channels;
    assert!(args.initial.len() == (K - 1) * channels && args.d_state.len() == args.initial.len());
    let (initial, x) = (args.initial, args.x);
    // Inputs counted from the oldest that is carried.
    let input = |n: usize| match n < K - 1 {
        true => load(s, taps.row(initial, n), at),
        false => load(s, taps.row(x, n + 1 - K), at),
    };
    let bias = taps.bias(s, at);
    let (mut weight, mut window, mut later) = ([bias; K], [zero; K], [zero; K]);
    let mut sums = Sums { weight: [zero; K], bias: zero };
    for i in 0..K {
        weight[i] = load(s, taps.row(taps.weight, i), at);
    }
    for i in 0..if tokens > 0 { K - 1 } else { 0 } {
        window[i] = input(tokens + i);
    }
    for t in (0..tokens).rev() {
        for i in (1..K).rev() {
            (window[i], later[i]) = (window[i - 1], later[i - 1]);
        }
        window[0] = input(t);
        let d_y = load(s, taps.row(args.d_y, t), at);
        later[0] = if taps.silu { s.mul(d_y, silu_slope(s, &weight, &window, bias)) } else { d_y };
        sums.add(s, later[0], &window);
        let mut sum = zero;
        if t + K > tokens {
            sum = load(s, &args.d_state[(t + K - 1 - tokens) * channels..][..channels], at);
        }
        for i in 0..K {
            sum = s.fma(weight[i], later[K - 1 - i], sum);
        }
        if let Some((d_x, add)) = &mut args.d_x {
            let d_x = &mut d_x[t * channels..(t + 1) * channels];
            let sum = if *add { s.add(load(s, d_x, at), sum) } else { sum };
            store(s, d_x, at, sum);
        }
        if t.is_multiple_of(SUMMED) {
            sums.flush(s, args, (channels, at));
        }
    }
    // In order: what is read of an old gradient lies at or before where a new one goes.
    for n in (0..K - 1).rev() {
        let mut sum = zero;
        if n >= tokens {
            sum = load(s, &args.d_state[(n - tokens) * channels..][..channels], at);
        }
        for i in 0..=n {
            sum = s.fma(weight[i], later[n - i], sum);
        }
        store(s, &mut args.d_state[n * channels..][..channels], at, sum);
    }
}

/// d silu(u) / du, u being the result before SiLU.
#[inline(always)]
fn silu_slope<S: Simd, const K: usize>(
    s: S,
    weight: &[S::F; K],
    window: &[S::F; K],
    bias: S::F,
) -> S::F {
    let mut u = bias;
    for i in 0..K {
        u = s.fma(weight[i], window[i], u);
    }
    math::silu_slope(s, u)
}

/// Gradients of parameters over some tokens.
struct Sums<F, const K: usize> {
    weight: [F; K],
    bias: F,
}

impl<F: Copy, const K: usize> Sums<F, K> {
    #[inline(always)]
    fn add<S: Simd<F = F>>(&mut self, s: S, g: F, window: &[F; K]) {
        for i in 0..K {
            self.weight[i] = s.fma(g, window[i], self.weight[i]);
        }
        self.bias = s.add(self.bias, g);
    }

    /// Adds them to what is there, and begins anew.
    #[inline(always)]
    fn flush<S: Simd<F = F>>(
        &mut self,
        s: S,
        args: &mut ConvolveBackward<'_>,
        (channels, at): (usize, usize),
    ) {
        let zero = s.splat(0.0);
        if let Some(d_weight) = &mut args.d_weight {
            for (i, row) in d_weight.chunks_exact_mut(channels).enumerate() {
                store(s, row, at, s.add(load(s, row, at), self.weight[i]));
            }
        }
        if let Some(d_bias) = &mut args.d_bias {
            store(s, d_bias, at, s.add(load(s, d_bias, at), self.bias));
        }
        *self = Sums { weight: [zero; K], bias: zero };
    }
}
