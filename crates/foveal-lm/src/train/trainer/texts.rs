//! The texts of a run as tokens: what to train on, and what is kept back.

use crate::tokenizer::Encode;
use crate::train::config::Config;
use crate::train::data::{Batches, Pair, PairBatches, Text, Tokens, digest, on_threads};
use crate::train::{Error, Vocabulary, corpus, pairs};

/// The text to train on, that to evaluate on, and what tells them from others.
pub(super) type Texts = (Text, Option<Text>, String);

/// The documents of a run, or its pairs, one text after the other. `builtin` is the document where there is none.
pub(super) fn read(config: &Config, builtin: Option<&str>) -> Result<Vec<String>, Error> {
    let mut texts = match config.has_pairs() {
        true => pairs::of_run(config)?,
        false => corpus::read(&config.data.train, &config.data)?,
    };
    match builtin {
        Some(text) if config.data.train.is_empty() && !config.has_pairs() => {
            texts.push(text.to_owned());
        }
        _ => {}
    }
    match (texts.is_empty(), config.has_pairs()) {
        (true, true) => Err(Error::NoPairs),
        (true, false) => Err(Error::NoText),
        _ => Ok(texts),
    }
}

/// The same as tokens.
pub(super) fn encoded(
    config: &Config,
    texts: &[String],
    vocabulary: &Vocabulary,
) -> Result<Texts, Error> {
    match config.has_pairs() {
        true => of_pairs(config, texts, vocabulary),
        false => of_documents(config, texts, vocabulary),
    }
}

fn of_documents(
    config: &Config,
    documents: &[String],
    vocabulary: &Vocabulary,
) -> Result<Texts, Error> {
    let mut tokens = Tokens::encode(documents, &vocabulary.tokenizer)?;
    let digest = tokens.digest();
    let data = &config.data;
    let streams = data.batch * config.train.accumulate;
    let kept = if data.validation.is_empty() {
        let least = 2 * data.sequence + 1;
        let share = (tokens.len() as f64 * data.validation_share) as usize;
        let wanted = data.validation_share > 0.0 && least <= tokens.len() / 2;
        tokens.split_off(if wanted { share.max(least) } else { 0 })
    } else {
        let documents = corpus::read(&data.validation, data)?;
        Tokens::encode(&documents, &vocabulary.tokenizer)?
    };
    let validation = match kept.is_empty() {
        true => None,
        false => {
            let streams = (kept.len() / (data.sequence + 1)).clamp(1, data.batch);
            Some(Text::One(Batches::new(kept, data, 0, streams, "text to evaluate on")?))
        }
    };
    let train = Batches::new(tokens, data, config.train.seed, streams, "text to train on")?;
    Ok((Text::One(train), validation, digest))
}

fn of_pairs(config: &Config, texts: &[String], vocabulary: &Vocabulary) -> Result<Texts, Error> {
    let data = &config.data;
    let mut all = tokens(config, texts, vocabulary)?;
    let digest = digest(&all);
    let kept = if data.validation.is_empty() {
        let wanted = data.validation_share > 0.0 && all.len() > 1;
        let share = (all.len() as f64 * data.validation_share) as usize;
        all.split_off(all.len() - if wanted { share.max(1) } else { 0 })
    } else {
        tokens(config, &pairs::read(&data.validation, data)?, vocabulary)?
    };
    let end = start(vocabulary)?;
    let in_order = |kept| Text::Pairs(PairBatches::in_order(kept, end, data.batch));
    let validation = if kept.is_empty() { None } else { Some(in_order(kept)) };
    let step = (data.batch * config.train.accumulate, config.train.seed);
    Ok((Text::Pairs(PairBatches::shuffled(all, end, step)?), validation, digest))
}

/// The token with which decoders begin and end.
pub(in crate::train) fn start(vocabulary: &Vocabulary) -> Result<u32, Error> {
    vocabulary.tokenizer.eos().ok_or_else(|| {
        let expected = "one with an end token, for train.objective = \"translation\"";
        Error::config("data.tokenizer", "without such a token", expected)
    })
}

fn tokens(config: &Config, texts: &[String], vocabulary: &Vocabulary) -> Result<Vec<Pair>, Error> {
    let tokenizer = &vocabulary.tokenizer;
    let encode = |text: &String| Ok(tokenizer.encode(text, Encode::TEXT)?);
    let encode = |part: &[String]| part.iter().map(encode).collect::<Result<Vec<_>, Error>>();
    let parts = on_threads(texts, encode).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut texts = parts.into_iter().flatten();
    let mut pairs = vec![];
    while let (Some(source), Some(target)) = (texts.next(), texts.next()) {
        let (found, limit) = (source.len().max(target.len() + 1), config.data.sequence);
        if found > limit {
            return Err(Error::LongPair { number: pairs.len() + 1, found, limit });
        }
        pairs.push([source, target]);
    }
    Ok(pairs)
}
