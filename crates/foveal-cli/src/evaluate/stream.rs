//! A text of any length, piece by piece.

use std::time::Instant;

use foveal_lm::evaluate::Running;
use foveal_lm::model::Scratch;
use foveal_lm::text_stream::TextStream;

use super::{Arguments, Figures};
use crate::progress::Progress;
use crate::session::Session;
use crate::{input, interrupt};

/// How well each token is predicted from what the model's layers keep of all before it.
pub(super) fn measure(arguments: &Arguments, session: &Session) -> anyhow::Result<Figures> {
    let Session { model, tokenizer, .. } = session;
    let mut state = arguments.kv.state(model)?;
    arguments.memory.keep(&mut state, session)?;
    let mut stream = TextStream::new(tokenizer, input::open(&arguments.text)?)?;
    let limit = arguments.tokens.unwrap_or(usize::MAX);
    let mut progress = Progress::new("read", limit);
    let (mut running, mut scratch) = (Running::default(), Scratch::new());
    let (start, mut tokens, mut bytes, mut kv_bytes) = (Instant::now(), 0usize, 0, 0);
    while tokens < limit {
        let Some(mut piece) = stream.next_piece()? else { break };
        piece.truncate(limit - tokens);
        running.push(model, &piece, (&mut state, &mut scratch), &mut |done| {
            progress.show(tokens + done);
            interrupt::flow()
        })?;
        // The first token of all is not predicted.
        let predicted = &piece[usize::from(tokens == 0).min(piece.len())..];
        let texts = predicted.iter().filter_map(|&token| tokenizer.token_bytes(token));
        bytes += texts.map(<[u8]>::len).sum::<usize>();
        tokens += piece.len();
        kv_bytes = kv_bytes.max(state.kv_bytes());
    }
    anyhow::ensure!(
        tokens >= 2,
        "the text has {tokens} tokens, at least 2 are needed: each is predicted from those before it"
    );
    let (seconds, file_bytes) = (start.elapsed().as_secs_f64(), state.memory_file_bytes());
    Ok(Figures { tokens, bytes, buckets: running.buckets, seconds, kv_bytes, file_bytes })
}
