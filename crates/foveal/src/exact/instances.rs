//! The engine once for each pair of storage types, compiled with this crate.
//!
//! ```text
//! Plan::forward<E, K> → E's instance → K's instance for E → forward::run<E, K>
//! ```
//!
//! Generic code is compiled where it is used. Without this detour through functions that are not generic, every
//! program, test and example would compile the engine anew, for minutes.

use super::backward::{self, BackwardProblem};
use super::{Problem, decode, forward};
use crate::cpu::Phase;
use crate::element::Element;
use half::{bf16, f16};

/// A checked call with its workspace.
#[derive(Debug)]
pub struct Run<'r, 'a, E, K>(Call<'r, 'a, E, K>);

#[derive(Debug)]
enum Call<'r, 'a, E, K> {
    Forward(Phase, &'r Problem<'a, E, K>, &'r mut [f32]),
    Backward(&'r mut BackwardProblem<'a, E, K>, &'r mut [f32]),
}

/// Runs forward with the kernels of a phase.
pub(crate) fn forward<E: Element, K: Element>(
    phase: Phase,
    problem: &Problem<'_, E, K>,
    floats: &mut [f32],
) {
    E::run(Run(Call::Forward(phase, problem, floats)));
}

/// Runs backward.
pub(crate) fn backward<E: Element, K: Element>(
    call: &mut BackwardProblem<'_, E, K>,
    floats: &mut [f32],
) {
    E::run(Run(Call::Backward(call, floats)));
}

impl<E: Element, K: Element> Run<'_, '_, E, K> {
    fn compile(self) {
        match self.0 {
            Call::Forward(Phase::Prompt, problem, floats) => forward::run(problem, floats),
            Call::Forward(Phase::Generated, problem, floats) => decode::run(problem, floats),
            Call::Backward(call, floats) => backward::run(call, floats),
        }
    }
}

/// The instances of a storage type: as that of queries, and as that of keys for queries of each type.
pub trait Instances: Sized {
    /// For queries of this type.
    fn run<K: Element>(run: Run<'_, '_, Self, K>);
    /// For keys of this type and queries of `f32`.
    fn run_f32(run: Run<'_, '_, f32, Self>);
    /// For keys of this type and queries of `f16`.
    fn run_f16(run: Run<'_, '_, f16, Self>);
    /// For keys of this type and queries of `bf16`.
    fn run_bf16(run: Run<'_, '_, bf16, Self>);
}

macro_rules! instances {
    ($($ty:ident: $own:ident),*) => {$(
        impl Instances for $ty {
            fn run<K: Element>(run: Run<'_, '_, $ty, K>) {
                K::$own(run);
            }
            #[inline(never)]
            fn run_f32(run: Run<'_, '_, f32, $ty>) {
                run.compile();
            }
            #[inline(never)]
            fn run_f16(run: Run<'_, '_, f16, $ty>) {
                run.compile();
            }
            #[inline(never)]
            fn run_bf16(run: Run<'_, '_, bf16, $ty>) {
                run.compile();
            }
        }
    )*};
}
instances!(f32: run_f32, f16: run_f16, bf16: run_bf16);
