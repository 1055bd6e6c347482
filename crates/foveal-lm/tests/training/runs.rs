//! Runs: the same bits whether they stop in between or not, for any number of threads, and for any cut of a step.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use foveal_lm::train::{Config, End, Event, Trainer, begin, run};

const TEXT: &str = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, \
    and nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the \
    world. It is a way I have of driving off the spleen, and regulating the circulation.\n";
const SMALL: &str = "[model]\nlayers = 2\nwidth = 16\nheads = 2\nfeed_forward = 24\n\
    mixer = [[{ name = 'full', heads = 1 }, { name = 'linear', heads = 1 }], { name = 'window', tokens = 5 }]\n\
    [data]\nsequence = 12\nbatch = 2\ntokenizer = 'bytes'\n\
    [optimizer]\nlearning_rate = 1e-2\n[schedule]\nsteps = 9\n\
    [train]\nevaluate_every = 4\nevaluate_batches = 3\ncheckpoint_every = 4\nprompt = 'C'\n";

/// A folder that is removed when it is done with.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("foveal-run-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn config(settings: &[&str]) -> Config {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    Config::parse(SMALL, &settings, Path::new("/")).unwrap()
}

pub(crate) fn text() -> String {
    TEXT.repeat(8)
}

pub(crate) fn bits(trainer: &Trainer) -> Vec<u32> {
    trainer.parameters().values().iter().map(|x| x.to_bits()).collect()
}

/// Takes a run to its end, or up to a step.
fn go(trainer: &mut Trainer, folder: &Path, stop: Option<u64>) -> End {
    let mut watch = |trainer: &Trainer, event: Event<'_>| match event {
        Event::Step(_) if Some(trainer.state().step) == stop => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    run(trainer, folder, &mut watch).unwrap()
}

#[test]
fn a_run_that_stops_anywhere_goes_on_with_the_same_bits() {
    let text = text();
    let all: [&[&str]; 3] = [
        &[],
        &["data.order=streams", "train.dropout=0.2", "train.accumulate=2"],
        &["train.recompute=true", "train.precision=bf16", "schedule.kind=wsd"],
    ];
    for (n, settings) in all.into_iter().enumerate() {
        let whole = Folder::new(&format!("whole-{n}"));
        let mut undisturbed = Trainer::new(config(settings), Some(&text)).unwrap();
        begin(&undisturbed, &whole.0).unwrap();
        assert_eq!(go(&mut undisturbed, &whole.0, None), End::Done);
        let best = undisturbed.state().best_loss();
        assert!(best.is_some());
        for stop in [1, 4, 6] {
            let folder = Folder::new(&format!("stopped-{n}-{stop}"));
            let mut first = Trainer::new(config(settings), Some(&text)).unwrap();
            begin(&first, &folder.0).unwrap();
            assert_eq!(go(&mut first, &folder.0, Some(stop)), End::Interrupted);
            drop(first);
            let mut second = Trainer::resume(&folder.0, &[], Some(&text)).unwrap();
            assert_eq!(second.state().step, stop);
            assert_eq!(go(&mut second, &folder.0, None), End::Done);
            assert!(bits(&second) == bits(&undisturbed), "{settings:?} stopped at {stop}");
            assert_eq!(second.state().best_loss(), best);
            assert_eq!(second.sample().unwrap(), undisturbed.sample().unwrap());
        }
    }
}

#[test]
fn threads_change_no_bit_of_a_run() {
    let text = text();
    let steps = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = Trainer::new(config(&[]), Some(&text)).unwrap();
            let losses: Vec<u64> = (0..3).map(|_| trainer.step().unwrap().loss.to_bits()).collect();
            (losses, bits(&trainer))
        })
    };
    assert!(steps(1) == steps(3));
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let text = text();
    let losses = |settings: &[&str]| {
        let mut trainer = Trainer::new(config(settings), Some(&text)).unwrap();
        (0..3).map(|_| trainer.step().unwrap().loss).collect::<Vec<f64>>()
    };
    let whole = losses(&["data.batch=4"]);
    let parts = losses(&["data.batch=1", "train.accumulate=4"]);
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() < 1e-5, "{whole:?} {parts:?}");
    }
    assert!(whole[2] < whole[0]);
}

#[test]
fn a_run_ends_when_evaluations_get_no_better() {
    let text = text();
    let folder = Folder::new("stale");
    // Steps so large that it can only get worse.
    let settings = [
        "optimizer.learning_rate=2",
        "schedule.kind=constant",
        "schedule.warmup=0",
        "schedule.steps=200",
        "train.patience=3",
        "train.evaluate_every=1",
    ];
    let mut trainer = Trainer::new(config(&settings), Some(&text)).unwrap();
    begin(&trainer, &folder.0).unwrap();
    assert_eq!(go(&mut trainer, &folder.0, None), End::Stale);
    let state = trainer.state();
    assert_eq!(state.step, state.best_step().unwrap() + 3);
    // The model is that of the best evaluation.
    let mut again = Trainer::new(config(&settings), Some(&text)).unwrap();
    for _ in 0..state.best_step().unwrap() {
        again.step().unwrap();
    }
    let expected: Vec<u8> =
        again.parameters().values().iter().flat_map(|x| x.to_le_bytes()).collect();
    let file = std::fs::read(folder.0.join("model.safetensors")).unwrap();
    assert!(file.ends_with(&expected));
}

#[test]
fn hidden_tokens_are_learned_from_both_sides() {
    let text = text();
    let settings = [
        "train.objective=masked",
        "model.mixer={name='full'}",
        "schedule.steps=30",
        "data.batch=8",
        "train.evaluate_every=0",
    ];
    let mut trainer = Trainer::new(config(&settings), Some(&text)).unwrap();
    let losses: Vec<f64> = (0..30).map(|_| trainer.step().unwrap().loss).collect();
    assert!(losses[25..].iter().sum::<f64>() < losses[..5].iter().sum::<f64>() * 0.8, "{losses:?}");
}
