//! A text of any length, piece by piece.

use std::time::Instant;

use foveal_lm::model::{Scratch, State};
use foveal_lm::prompt_cache::{PromptCache, Streamed};
use foveal_lm::text_stream::TextStream;

use super::{Arguments, Figures};
use crate::progress::Progress;
use crate::session::Session;
use crate::{input, interrupt, output};

/// How well each token is predicted from what the model's layers keep of all before it.
pub(super) fn measure(arguments: &Arguments, session: &Session) -> anyhow::Result<Figures> {
    let Session { model, tokenizer, .. } = session;
    let file = File::new(arguments, session)?;
    let (mut read, mut state) = file.begin(arguments, session)?;
    let (from, offset) = (input::open(&arguments.text)?, read.offset);
    let mut stream = TextStream::after(tokenizer, from, offset)?.pieces_of(arguments.piece);
    let limit = arguments.tokens.unwrap_or(usize::MAX);
    let mut progress = Progress::new("read", arguments.tokens.unwrap_or(0));
    let (mut scratch, mut saved) = (Scratch::new(), read.tokens);
    let (start, earlier, mut kv_bytes) = (Instant::now(), read.tokens, state.kv_bytes());
    while read.tokens < limit {
        let Some(mut piece) = stream.next_piece()? else { break };
        let whole = piece.len() <= limit - read.tokens;
        piece.truncate(limit - read.tokens);
        let both = (&mut state, &mut scratch);
        read.running.push(model, &piece, both, &mut |done| {
            progress.show(read.tokens + done);
            interrupt::flow()
        })?;
        // The first token of all is not predicted.
        let predicted = &piece[usize::from(read.tokens == 0).min(piece.len())..];
        let texts = predicted.iter().filter_map(|&token| tokenizer.token_bytes(token));
        read.bytes += texts.map(<[u8]>::len).sum::<usize>();
        read.tokens += piece.len();
        read.offset = stream.offset();
        kv_bytes = kv_bytes.max(state.kv_bytes());
        if whole && read.tokens - saved >= arguments.save_every {
            file.save(&read, &state)?;
            saved = read.tokens;
        }
    }
    let tokens = read.tokens;
    anyhow::ensure!(
        tokens >= 2,
        "the text has {tokens} tokens, at least 2 are needed: each is predicted from those before it"
    );
    let (seconds, file_bytes) = (start.elapsed().as_secs_f64(), state.memory_file_bytes());
    let (digest, bytes, new) = (Some(read.running.digest), read.bytes, tokens - earlier);
    let buckets = read.running.buckets;
    Ok(Figures { tokens, new, bytes, buckets, seconds, kv_bytes, file_bytes, digest })
}

/// Where what was read is kept, if anywhere.
struct File<'a>(Option<(&'a std::path::Path, PromptCache<'a>)>);

impl<'a> File<'a> {
    fn new(arguments: &'a Arguments, session: &'a Session) -> anyhow::Result<File<'a>> {
        let Some(path) = &arguments.state else { return Ok(File(None)) };
        let options = arguments.kv.options()?;
        let cache = PromptCache::new(&session.model, &session.weights, options)?;
        let cache = match arguments.memory.folder(session) {
            Some(folder) => cache.with_memories(folder),
            None => cache,
        };
        Ok(File(Some((path, cache))))
    }

    /// From where the file says, or from the beginning.
    fn begin(&self, arguments: &Arguments, session: &Session) -> anyhow::Result<(Streamed, State)> {
        if let File(Some((path, cache))) = self
            && let Some((streamed, state)) = cache.open_streamed(path)?
        {
            output::note(&format!("foveal: {} tokens have been read before", streamed.tokens));
            return Ok((streamed, state));
        }
        let mut state = arguments.kv.state(&session.model)?;
        arguments.memory.keep(&mut state, session)?;
        if self.0.is_some() {
            // What is written of a text is all that goes on with it.
            state.reset();
        }
        Ok((Streamed::default(), state))
    }

    fn save(&self, streamed: &Streamed, state: &State) -> anyhow::Result<()> {
        let File(Some((path, cache))) = self else { return Ok(()) };
        state.sync_memories()?;
        Ok(cache.save_streamed(path, streamed, state)?)
    }
}
