//! Runs on several processes: the bits of one process that computes steps in as many pieces, also when stopped and resumed on
//! other numbers of them; and failures that all know of.

use std::ops::ControlFlow;
use std::path::Path;

use foveal_lm::train::{Config, End, Error, Event, Trainer, begin, run};
use foveal_processes::{Processes, Threads};

use crate::pairs::translation;
use crate::runs::{Folder, bits, config, text};

/// What a run on so many processes ends with, on each: losses, parameters, the best evaluation.
type Ended = (Vec<u64>, Vec<u32>, Option<u64>);

/// Says that the run is one of [`translation`].
const PAIRS: &str = "data.task=reverse";

/// From the beginning, or from the checkpoint in `folder`, up to a step.
fn go(count: usize, folder: &Path, settings: &[&str], stop: Option<u64>) -> Vec<Ended> {
    let text = text();
    Threads::run(count, |processes| {
        let writes = processes.rank() == 0;
        let processes = Box::new(processes);
        let mut trainer = match folder.join("train.toml").exists() {
            true => Trainer::resume_among(processes, folder, &[], Some(&text)).unwrap(),
            false => {
                let config = match settings.contains(&PAIRS) {
                    true => translation(settings),
                    false => config(settings),
                };
                let new = Trainer::new_among(processes, config, Some(&text)).unwrap();
                // The folder is there when all have looked whether it is.
                begin(&new, folder).unwrap();
                new
            }
        };
        let mut losses = vec![];
        let mut watch = |trainer: &Trainer, event: Event<'_>| match event {
            Event::Step(step) => {
                losses.push(step.loss.to_bits());
                // The process that does not write asks for the end.
                match Some(trainer.state().step) == stop && (!writes || count == 1) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            }
            _ => ControlFlow::Continue(()),
        };
        let end = run(&mut trainer, folder, &mut watch).unwrap();
        assert_eq!(end, if stop.is_some() { End::Interrupted } else { End::Done });
        let best = trainer.state().best_loss().map(f64::to_bits);
        (losses, bits(&trainer), best)
    })
}

#[test]
fn processes_change_no_bit_of_a_run_in_so_many_pieces() {
    let all: [&[&str]; 5] = [
        &["data.batch=4"],
        &["data.batch=4", "data.order=streams", "train.dropout=0.2", "train.accumulate=2"],
        &["data.batch=1", "train.accumulate=4", "train.precision=bf16", "train.recompute=true"],
        &[
            "data.batch=4",
            "train.objective=masked",
            "model.mixer={name='full'}",
            "train.mask_share=0.5",
        ],
        &["data.batch=8", "train.accumulate=2", "train.dropout=0.1", PAIRS],
    ];
    for (n, settings) in all.into_iter().enumerate() {
        let settings: Vec<&str> =
            settings.iter().copied().chain(["train.pieces=4", "schedule.steps=5"]).collect();
        let one = Folder::new(&format!("one-{n}"));
        let expected = go(1, &one.0, &settings, None).swap_remove(0);
        for count in [2, 4] {
            let folder = Folder::new(&format!("several-{n}-{count}"));
            for found in go(count, &folder.0, &settings, None) {
                assert!(found == expected, "{settings:?} on {count} processes");
            }
            // Stopped, and resumed on another number of processes.
            let folder = Folder::new(&format!("resumed-{n}-{count}"));
            go(count, &folder.0, &settings, Some(3));
            for found in go(6 / (count + 1), &folder.0, &settings, None) {
                assert!(found.1 == expected.1 && found.2 == expected.2, "{settings:?} resumed");
            }
            let model =
                |folder: &Folder| std::fs::read(folder.0.join("model.safetensors")).unwrap();
            assert!(model(&folder) == model(&one));
        }
    }
}

#[test]
fn one_process_and_two_compute_the_same_bits_unless_told_otherwise() {
    let run = |count, settings: &[&str], name: &str| {
        let folder = Folder::new(name);
        let ended = go(count, &folder.0, settings, None).swap_remove(0);
        let config = std::fs::read_to_string(folder.0.join("train.toml")).unwrap();
        let pieces = config.lines().find(|line| line.starts_with("pieces")).unwrap().to_owned();
        (ended, pieces)
    };
    let one = run(1, &["data.batch=6"], "usual-one");
    let two = run(2, &["data.batch=6"], "usual-two");
    assert!(one == two && one.1 == "pieces = 2", "{} {}", one.1, two.1);
    // Other pieces change roundings alone.
    for (count, settings, pieces) in [
        (3, &["data.batch=6"][..], "pieces = 3"),
        (1, &["data.batch=6", "train.pieces=1"], "pieces = 1"),
    ] {
        let other = run(count, settings, "usual-other");
        assert_eq!(other.1, pieces);
        assert_ne!(other.0.1, one.0.1);
        for (a, b) in one.0.0.iter().zip(&other.0.0) {
            let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
            assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
        }
    }
    // What can't be halved is one piece.
    assert_eq!(run(1, &["data.batch=3"], "usual-odd").1, "pieces = 1");
}

/// A run that does not say in how many pieces was computed whole.
#[test]
fn runs_of_before_go_on_in_one_piece() {
    let text = text();
    let folder = Folder::new("before");
    let ended = |folder: &Folder| {
        let mut trainer = Trainer::resume(&folder.0, &[], Some(&text)).unwrap();
        run(&mut trainer, &folder.0, &mut |_, _| ControlFlow::Continue(())).unwrap();
        bits(&trainer)
    };
    let settings = ["data.batch=4", "train.pieces=1"];
    go(1, &folder.0, &settings, Some(2));
    let path = folder.0.join("train.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("pieces = 1\n", "")).unwrap();
    let whole = Folder::new("before-whole");
    let expected = go(1, &whole.0, &settings, None).swap_remove(0).1;
    assert!(ended(&folder) == expected);
}

/// What each of some processes says that can't begin.
fn refused(count: usize, settings: impl Fn(usize) -> Config + Sync) -> Vec<Error> {
    let text = text();
    Threads::run(count, |processes| {
        let config = settings(processes.rank());
        Trainer::new_among(Box::new(processes), config, Some(&text)).unwrap_err()
    })
}

#[test]
fn what_can_not_be_shared_out_is_refused() {
    let errors = refused(2, |_| config(&["data.batch=3", "train.pieces=2"]));
    let text = errors[1].to_string();
    assert!(
        text.contains("data.batch · train.accumulate is 3, expected a multiple of the 2"),
        "{text}"
    );
    let errors = refused(2, |_| config(&["train.pieces=3", "data.batch=6"]));
    assert!(errors[0].to_string().contains("train.pieces is 3, expected a multiple of the 2 proc"));
    // Streams are carried in calls.
    let folder = Folder::new("other-pieces");
    let settings =
        ["data.order=streams", "data.batch=4", "train.pieces=1", "model.mixer={name='gla'}"];
    go(1, &folder.0, &settings, Some(2));
    let text = text_of_resume(&folder, &[]);
    assert!(text.contains("train.pieces is 1, expected a multiple of the 2 proc"), "{text}");
    let text = text_of_resume(&folder, &["train.pieces=2".to_owned()]);
    assert!(text.contains("in 1 calls, now in 2; set train.pieces"), "{text}");
}

fn text_of_resume(folder: &Folder, settings: &[String]) -> String {
    let text = text();
    let errors = Threads::run(2, |processes| {
        let processes = Box::new(processes);
        let resumed = Trainer::resume_among(processes, &folder.0, settings, Some(&text));
        resumed.unwrap_err().to_string()
    });
    errors[0].clone()
}

#[test]
fn processes_with_other_things_are_refused_and_failures_known_to_all() {
    let errors = refused(2, |rank| config(&[&format!("train.seed={rank}")]));
    assert!(matches!(errors[0], Error::Processes(_)));
    assert!(errors[1].to_string().contains("for the configuration"), "{}", errors[1]);
    let errors = refused(3, |rank| {
        config(if rank == 1 { &["data.tokenizer=/nowhere.json"] } else { &["data.batch=3"] })
    });
    assert!(!matches!(errors[1], Error::Elsewhere { .. }), "{}", errors[1]);
    for n in [0, 2] {
        assert!(matches!(&errors[n], Error::Elsewhere { rank: 1, .. }), "{}", errors[n]);
    }
    // A loss that is not finite ends all; a folder that is taken too.
    let text = text();
    let taken = Folder::new("taken");
    std::fs::create_dir_all(&taken.0).unwrap();
    std::fs::write(taken.0.join("train.toml"), "").unwrap();
    let ends = Threads::run(2, |processes| {
        let settings = ["optimizer.learning_rate=1000", "optimizer.clip=0", "schedule.warmup=0"];
        let mut trainer =
            Trainer::new_among(Box::new(processes), config(&settings), Some(&text)).unwrap();
        let taken = begin(&trainer, &taken.0).unwrap_err();
        let mut steps = (0..200).map(|_| trainer.step());
        (taken, steps.find_map(Result::err))
    });
    assert!(matches!(ends[0].0, Error::Taken { .. }));
    assert!(matches!(ends[1].0, Error::Elsewhere { rank: 0, .. }));
    let not_finite = |error: &Option<Error>| matches!(error, Some(Error::NotFinite { .. }));
    assert!(not_finite(&ends[0].1) || not_finite(&ends[1].1), "{:?}", ends[0].1);
    assert!(ends.iter().all(|end| end.1.is_some()));
}
