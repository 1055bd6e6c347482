//! The encoder–decoder by configuration: runs that stop and go on, a task that is learned, and what is refused.

use std::ops::ControlFlow;
use std::path::Path;

use foveal_lm::train::{Config, End, Error, Event, Trainer, begin, run};

use crate::runs::{Folder, bits};

const SMALL: &str = "[model]\narchitecture = 'encoder_decoder'\nencoder_layers = 1\nlayers = 1\nwidth = 32\nheads = 2\n\
    feed_forward = 64\n[data]\nsequence = 8\nbatch = 8\n\
    [optimizer]\nlearning_rate = 5e-3\nbetas = [0.9, 0.98]\n[schedule]\nsteps = 9\n\
    [train]\nobjective = 'translation'\nsmoothing = 0.1\nevaluate_every = 4\nevaluate_batches = 2\n\
    checkpoint_every = 4\n";

pub(crate) fn translation(settings: &[&str]) -> Config {
    read(settings).unwrap()
}

fn read(settings: &[&str]) -> Result<Config, Error> {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    Config::parse(SMALL, &settings, Path::new("/"))
}

fn go(trainer: &mut Trainer, folder: &Folder, stop: Option<u64>) -> End {
    let mut watch = |trainer: &Trainer, event: Event<'_>| match event {
        Event::Step(_) if Some(trainer.state().step) == stop => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    run(trainer, &folder.0, &mut watch).unwrap()
}

#[test]
fn runs_over_pairs_go_on_with_the_same_bits() {
    let all: [&[&str]; 3] = [
        &["data.task=copy"],
        &["data.task=reverse", "train.dropout=0.1", "train.accumulate=2", "model.norms=pre"],
        &[
            "data.task=copy",
            "model.positions=learned",
            "train.precision=bf16",
            "data.tokenizer=bpe",
        ],
    ];
    for (n, settings) in all.into_iter().enumerate() {
        let whole = Folder::new(&format!("pairs-whole-{n}"));
        let mut undisturbed = Trainer::new(translation(settings), None).unwrap();
        begin(&undisturbed, &whole.0).unwrap();
        assert_eq!(go(&mut undisturbed, &whole, None), End::Done);
        assert!(undisturbed.state().best_loss().is_some());
        for stop in [1, 6] {
            let folder = Folder::new(&format!("pairs-stopped-{n}-{stop}"));
            let mut first = Trainer::new(translation(settings), None).unwrap();
            begin(&first, &folder.0).unwrap();
            assert_eq!(go(&mut first, &folder, Some(stop)), End::Interrupted);
            drop(first);
            let mut second = Trainer::resume(&folder.0, &[], None).unwrap();
            assert_eq!(second.state().step, stop);
            assert_eq!(go(&mut second, &folder, None), End::Done);
            assert!(bits(&second) == bits(&undisturbed), "{settings:?} stopped at {stop}");
            assert_eq!(second.state().best_loss(), undisturbed.state().best_loss());
            assert_eq!(second.sample().unwrap(), undisturbed.sample().unwrap());
        }
    }
}

#[test]
fn copying_is_learned_and_said() {
    // Of a certain token smoothing leaves −ln(1 − 0.02).
    let settings = [
        "data.task=copy",
        "data.sequence=5",
        "data.batch=32",
        "schedule.steps=1000",
        "train.smoothing=0.02",
    ];
    let mut trainer = Trainer::new(translation(&settings), None).unwrap();
    let before = trainer.sample().unwrap();
    assert!(before.lines().count() == 3 && before.contains('('), "{before}");
    for _ in 0..1000 {
        trainer.step().unwrap();
        if trainer.state().step % 100 == 0 && trainer.evaluate().unwrap().unwrap().loss < 0.05 {
            break;
        }
    }
    let loss = trainer.evaluate().unwrap().unwrap().loss;
    assert!(loss < 0.05, "{loss} after {} steps", trainer.state().step);
    // Pairs that it was not trained on; brackets have what it should have said.
    let sample = trainer.sample().unwrap();
    assert!(!sample.contains('('), "{sample}");
    assert!(sample.lines().all(|line| {
        let (source, said) = line.split_once(" → ").unwrap();
        source == said && source.len() == 4
    }));
}

#[test]
fn what_pairs_can_not_have_is_refused() {
    for (settings, words) in [
        (&["model.architecture=llama"][..], "model.architecture is that of one text"),
        (&["train.objective=causal"], "train.objective is that of one text"),
        (&["model.mixer={name='linear'}"], "model.mixer is set"),
        (&["model.kv_heads=1"], "model.kv_heads is set"),
        (&["train.recompute=true"], "train.recompute is set"),
        (&["data.order=streams"], "data.order is"),
        (&["data.task=copy", "data.train=['x.tsv']"], "data.task is set"),
        (&["data.task=sort"], "task"),
        (&["data.sequence=1"], "data.sequence is 1"),
        (&["train.smoothing=1.0"], "train.smoothing is 1"),
        (&["model.norms=between"], "norms"),
        (
            &["model.architecture=llama", "train.objective=causal", "model.positions=learned"],
            "model.encoder_layers is set",
        ),
    ] {
        let message = read(settings).unwrap_err().to_string();
        assert!(message.contains(words), "{settings:?}: {message}");
    }
    let refused = |settings: &[&str]| Trainer::new(translation(settings), None).unwrap_err();
    assert!(matches!(refused(&[]), Error::NoPairs));
    let few = refused(&["data.task=copy", "data.batch=5000"]);
    assert!(matches!(few, Error::TooFewPairs { found: 3892, expected: 5000 }), "{few}");
    let context = refused(&["data.task=copy", "model.context=4"]).to_string();
    assert!(context.contains("model.context is 4, expected 8 at least"), "{context}");
    let heads = refused(&["data.task=copy", "model.heads=32"]).to_string();
    assert!(heads.contains("number of heads is 32"), "{heads}");
    let folder = Folder::new("pairs-long");
    std::fs::create_dir_all(&folder.0).unwrap();
    std::fs::write(folder.0.join("a.tsv"), "short\tshort\nshort\tall too long\n").unwrap();
    let long = refused(&[&format!("data.train=['{}']", folder.0.display())]);
    assert!(matches!(long, Error::LongPair { number: 2, found: 13, limit: 8 }), "{long}");
}
