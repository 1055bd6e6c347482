//! Text from the built-in model.

use foveal_lm::Error;
use foveal_lm::generate::{Generator, Options, Piece, StopReason, prompt_tokens};
use foveal_lm::sample::Sampling;

use crate::small;

const PROMPT: &str = "Alice was beginning to";
/// What the model's own code goes on with.
const GREEDY: &str =
    " the\nQueen to the Queen, and she found it was saying to herself, and\nshe was";

fn generate(options: &Options) -> (Vec<Piece>, Option<StopReason>) {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let prompt = prompt_tokens(&tokenizer, PROMPT).unwrap();
    let mut state = model.state().unwrap();
    let mut generator = Generator::new(&model, &tokenizer, &mut state, &prompt, options).unwrap();
    let pieces = generator.by_ref().collect::<Result<_, Error>>().unwrap();
    assert!(generator.next().is_none());
    (pieces, generator.stopped())
}

fn greedy(max_tokens: usize, stop: &[&str]) -> Options {
    let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
    Options { max_tokens, stop, sampling: Sampling::greedy(), logprobs: None }
}

fn text(pieces: &[Piece]) -> String {
    pieces.iter().map(|piece| &*piece.text).collect()
}

#[test]
fn greedy_text_is_that_of_the_original() {
    let (pieces, stopped) = generate(&greedy(60, &[]));
    assert!(text(&pieces).starts_with(GREEDY), "{:?}", text(&pieces));
    assert_eq!((pieces.len(), stopped), (60, Some(StopReason::MaxTokens)));
}

#[test]
fn pieces_make_up_the_text_of_their_tokens() {
    let options = Options { max_tokens: 200, ..Options::default() };
    let (pieces, _) = generate(&options);
    let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
    let tokenizer = small::tokenizer();
    let prompt = prompt_tokens(&tokenizer, PROMPT).unwrap();
    let whole = tokenizer.decode(&[&prompt[..], &tokens].concat()).unwrap();
    assert_eq!(format!("{PROMPT}{}", text(&pieces)), whole);
    // The same seed, the same text; another one, another.
    assert_eq!(generate(&options).0, pieces);
    let sampling = Sampling { seed: 1, ..Sampling::default() };
    assert_ne!(generate(&Options { sampling, ..options }).0, pieces);
}

#[test]
fn stop_strings_end_the_text_before_them() {
    // Within a token, across tokens, at the very beginning, and the first of several.
    for (stops, expected) in [
        (&["Queen,"][..], " the\nQueen to the "),
        (&["she found it"], " the\nQueen to the Queen, and "),
        (&[" the"], ""),
        (&["herself", "\n"], " the"),
    ] {
        let (pieces, stopped) = generate(&greedy(60, stops));
        assert_eq!(text(&pieces), expected, "{stops:?}");
        assert_eq!(stopped, Some(StopReason::StopString));
    }
}

#[test]
fn a_beginning_of_a_stop_string_is_given_out_at_the_end() {
    let (pieces, stopped) = generate(&greedy(60, &[]));
    let all = text(&pieces);
    // One that would need one more character than there is.
    let never = format!("{}#", &all[all.len() - 5..]);
    assert_eq!(text(&generate(&greedy(60, &[&never])).0), all);
    assert_eq!(stopped, Some(StopReason::MaxTokens));
}

#[test]
fn no_tokens_are_no_text() {
    assert_eq!(generate(&greedy(0, &[])), (vec![], Some(StopReason::MaxTokens)));
}

#[test]
fn an_empty_prompt_is_refused() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut state = model.state().unwrap();
    let options = Options::default();
    let error = Generator::new(&model, &tokenizer, &mut state, &[], &options).unwrap_err();
    assert!(matches!(error, Error::EmptyPrompt), "{error}");
    assert_eq!(prompt_tokens(&tokenizer, "").is_ok(), tokenizer.bos().is_some());
}

#[test]
fn a_text_goes_on_from_where_its_state_is() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let prompt = prompt_tokens(&tokenizer, PROMPT).unwrap();
    let (first, rest) = prompt.split_at(2);
    let mut state = model.state().unwrap();
    let none = greedy(0, &[]);
    Generator::new(&model, &tokenizer, &mut state, first, &none).unwrap();
    let options = greedy(20, &[]);
    let generator = Generator::new(&model, &tokenizer, &mut state, rest, &options).unwrap();
    let pieces: Vec<Piece> = generator.collect::<Result<_, _>>().unwrap();
    assert_eq!(pieces, generate(&options).0);
}
