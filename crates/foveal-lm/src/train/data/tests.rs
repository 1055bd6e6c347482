use super::*;
use crate::train::Vocabulary;

fn section(order: Order, sequence: usize) -> DataSection {
    DataSection { order, sequence, ..DataSection::default() }
}

fn text(len: usize, ends: &[usize]) -> Tokens {
    Tokens { tokens: (0..len as u32).collect(), ends: ends.to_vec() }
}

#[test]
fn an_epoch_has_every_sequence_once() {
    let data = section(Order::Shuffled, 4);
    let mut batches = Batches::new(text(43, &[43]), &data, 7, 3, "text").unwrap();
    let mut begins = vec![];
    let mut epochs = vec![];
    while batches.position().epoch < 3 {
        epochs.push(batches.position().epoch);
        let batch = batches.next(0..1);
        assert_eq!(batch.tokens.len(), 4);
        for (token, target) in batch.tokens.iter().zip(&batch.targets) {
            assert_eq!(token + 1, *target);
        }
        begins.push(batch.tokens[0]);
    }
    for epoch in 0..3 {
        let of: Vec<u32> =
            begins.iter().zip(&epochs).filter(|(_, e)| **e == epoch).map(|(b, _)| *b).collect();
        let mut sorted = of.clone();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[1] - pair[0] == 4), "{sorted:?}");
        assert_eq!(sorted.len(), (42 - sorted[0] as usize) / 4);
        assert_ne!(of, sorted);
    }
}

#[test]
fn a_position_is_all_that_there_is_to_know() {
    for order in [Order::Shuffled, Order::Streams] {
        let data = section(order, 5);
        let make = || Batches::new(text(101, &[30, 31, 77, 101]), &data, 3, 4, "text").unwrap();
        let mut whole = make();
        for _ in 0..40 {
            let mut again = make();
            again.set_position(whole.position().clone()).unwrap();
            let (a, b) = (whole.next(0..4), again.next(0..4));
            assert_eq!(a, b);
            assert_eq!(whole.position(), again.position());
        }
        assert!(whole.position().epoch > 1);
    }
    let mut batches =
        Batches::new(text(101, &[101]), &section(Order::Streams, 5), 3, 4, "text").unwrap();
    let foreign =
        Position { streams: vec![Stream { at: 500, fresh: true }; 4], ..Position::default() };
    assert!(matches!(batches.set_position(foreign), Err(Error::OtherText)));
    assert!(matches!(batches.set_position(Position::default()), Err(Error::OtherText)));
}

#[test]
fn streams_go_on_and_end_with_their_documents() {
    let data = section(Order::Streams, 4);
    let mut batches = Batches::new(text(31, &[7, 8, 31]), &data, 1, 2, "text").unwrap();
    let mut read: [Vec<(Vec<u32>, bool)>; 2] = [vec![], vec![]];
    for _ in 0..8 {
        for (place, read) in read.iter_mut().enumerate() {
            let batch = batches.next(place..place + 1);
            let known = batch.targets.iter().filter(|&&target| target != IGNORED).copied();
            read.push((known.collect(), batch.fresh[0]));
        }
    }
    // Tokens 0 to 6 are a document, 7 another, 8 to 14 the beginning of a third.
    let part = [
        (vec![1, 2, 3, 4], true),
        (vec![5, 6], false),
        (vec![], true),
        (vec![9, 10, 11, 12], true),
        (vec![13, 14], false),
    ];
    assert_eq!(read[0][..5], part[..]);
    assert_eq!(read[0][5..], part[..3]);
    let begins: Vec<bool> = read[1].iter().map(|(_, fresh)| *fresh).collect();
    assert_eq!(begins, [true, false, false, false, true, false, false, false]);
    assert_eq!(read[1][3].0, [28, 29]);
    // One document in equal parts begins and ends in step.
    let mut batches = Batches::new(text(31, &[31]), &data, 1, 2, "text").unwrap();
    assert!(batches.in_step());
    for _ in 0..9 {
        let batch = batches.next(0..2);
        assert_eq!(batch.fresh[0], batch.fresh[1]);
    }
}

#[test]
fn what_is_kept_back_is_at_the_end() {
    let mut tokens = text(20, &[5, 12, 20]);
    let last = tokens.split_off(10);
    assert_eq!((tokens.len(), &tokens.ends[..]), (10, &[5, 10][..]));
    assert_eq!((last.tokens[0], &last.ends[..]), (10, &[2, 10][..]));
    let mut tokens = text(20, &[5, 12, 20]);
    assert_eq!(tokens.split_off(8).ends, [8]);
    assert_eq!(tokens.ends, [5, 12]);
    assert_eq!(tokens.split_off(50).ends, [5, 12]);
    assert!(tokens.is_empty() && tokens.ends.is_empty());
}

#[test]
fn documents_are_joined_in_their_order() {
    let vocabulary = Vocabulary::new("bytes", (0, false), &[]).unwrap();
    let tokens = |documents: &[&str]| {
        let documents: Vec<String> = documents.iter().map(|&text| text.to_owned()).collect();
        Tokens::encode(&documents, &vocabulary.tokenizer).unwrap()
    };
    assert_eq!(tokens(&["ab"]), Tokens { tokens: vec![97, 98], ends: vec![2] });
    let two = tokens(&["ab", "c"]);
    assert_eq!(two, Tokens { tokens: vec![97, 98, 256, 99, 256], ends: vec![3, 5] });
    assert_ne!(two.digest(), tokens(&["abc"]).digest());
    // Long texts are encoded in pieces, which changes nothing.
    let long = "a line of text\n".repeat(PIECE / 8);
    let whole = vocabulary.tokenizer.encode(&long, Encode::TEXT).unwrap();
    assert_eq!(tokens(&[&long]).tokens, whole);
}

#[test]
fn hidden_tokens_are_asked_for() {
    let whole = Sequences {
        sources: vec![],
        tokens: (0..20_000).collect(),
        targets: vec![],
        fresh: vec![true],
    };
    let whole = Sequences { targets: vec![IGNORED; 20_000], ..whole };
    let hidden = whole.clone().hide(30_000, 20_000, 0.15, 5);
    assert_eq!(hidden, whole.clone().hide(30_000, 20_000, 0.15, 5));
    let asked: Vec<usize> = (0..20_000).filter(|&n| hidden.targets[n] != IGNORED).collect();
    assert!((2_800..3_200).contains(&asked.len()), "{}", asked.len());
    assert!(asked.iter().all(|&n| hidden.targets[n] == n as u32));
    let masked = asked.iter().filter(|&&n| hidden.tokens[n] == 30_000).count();
    let kept = asked.iter().filter(|&&n| hidden.tokens[n] == n as u32).count();
    assert!((masked * 10).abs_diff(asked.len() * 8) < asked.len(), "{masked}");
    assert!((kept * 10).abs_diff(asked.len()) < asked.len() / 2, "{kept}");
    let others = (0..20_000).filter(|n| !asked.contains(n));
    assert!(others.into_iter().all(|n| hidden.tokens[n] == n as u32));
}

#[test]
fn short_texts_are_refused() {
    let short = |order| Batches::new(text(7, &[7]), &section(order, 4), 1, 4, "text").unwrap_err();
    for order in [Order::Shuffled, Order::Streams] {
        let message = short(order).to_string();
        assert!(message.contains("7 tokens, expected 8"), "{message}");
    }
}
