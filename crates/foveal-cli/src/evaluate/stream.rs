//! A text of any length, piece by piece, document by document.

use std::io::BufRead;
use std::time::Instant;

use foveal_lm::documents::Document;
use foveal_lm::model::{Scratch, State};
use foveal_lm::prompt_cache::{PromptCache, Streamed};
use foveal_lm::text_stream::TextStream;

use super::{Arguments, Figures};
use crate::progress::Progress;
use crate::session::Session;
use crate::{interrupt, output};

/// How well each token is predicted from what the model's layers keep of all before it.
pub(super) fn measure(arguments: &Arguments, session: &Session) -> anyhow::Result<Figures> {
    let file = File::new(arguments, session)?;
    let (read, state) = file.begin(arguments, session)?;
    let (start, earlier, kv_bytes) = (Instant::now(), read.tokens, state.kv_bytes());
    let progress = Progress::new("read", arguments.tokens.unwrap_or(0));
    let saved = read.tokens;
    let scratch = Scratch::new();
    let mut reading = Reading {
        arguments,
        session,
        file,
        read,
        state,
        scratch,
        progress,
        saved,
        kv_bytes,
        documents: 0,
    };
    let mut documents = arguments.documents.read(&arguments.text)?;
    while reading.left() > 0 {
        let Some(document) = documents.next_document()? else { break };
        reading.document(document)?;
    }
    let Reading { read, state, kv_bytes, documents, .. } = reading;
    let (tokens, predicted) = (read.tokens, read.running.total().tokens);
    anyhow::ensure!(
        predicted >= 1,
        "the text has {tokens} tokens, at least 2 are needed: each is predicted from those before it in its document"
    );
    let (seconds, file_bytes) = (start.elapsed().as_secs_f64(), state.memory_file_bytes());
    let (digest, bytes, new) = (Some(read.running.digest), read.bytes, tokens - earlier);
    let buckets = read.running.buckets;
    Ok(Figures { tokens, new, bytes, buckets, seconds, kv_bytes, file_bytes, digest, documents })
}

/// A text that is being read.
struct Reading<'a> {
    arguments: &'a Arguments,
    session: &'a Session,
    file: File<'a>,
    read: Streamed,
    state: State,
    scratch: Scratch,
    progress: Progress,
    /// Tokens that the file has.
    saved: usize,
    /// At most so far.
    kv_bytes: usize,
    documents: usize,
}

impl Reading<'_> {
    /// Tokens that may still be read.
    fn left(&self) -> usize {
        self.arguments.tokens.unwrap_or(usize::MAX) - self.read.tokens
    }

    /// Reads a document, the first one on from where a file has left it; others find nothing remembered.
    fn document<R: BufRead>(&mut self, document: Document<'_, R>) -> anyhow::Result<()> {
        if self.documents > 0 {
            self.state.reset();
            self.read.running.pending = None;
            self.read.offset = 0;
        }
        self.documents += 1;
        let (tokenizer, offset) = (&self.session.tokenizer, self.read.offset);
        let stream = TextStream::after(tokenizer, document, offset)?;
        let mut stream = stream.pieces_of(self.arguments.piece);
        while self.left() > 0 {
            let Some(mut piece) = stream.next_piece()? else { break };
            let whole = piece.len() <= self.left();
            piece.truncate(self.left());
            self.piece(&piece)?;
            self.read.offset = stream.offset();
            if whole && self.read.tokens - self.saved >= self.arguments.save_every {
                self.file.save(&self.read, &self.state)?;
                self.saved = self.read.tokens;
            }
        }
        Ok(())
    }

    fn piece(&mut self, piece: &[u32]) -> anyhow::Result<()> {
        let Session { model, tokenizer, .. } = self.session;
        // The first token of a document is not predicted.
        let first = self.read.running.pending.is_none();
        let (read, both) = (self.read.tokens, (&mut self.state, &mut self.scratch));
        self.read.running.push(model, piece, both, &mut |done| {
            self.progress.show(read + done);
            interrupt::flow()
        })?;
        let predicted = &piece[usize::from(first).min(piece.len())..];
        let texts = predicted.iter().filter_map(|&token| tokenizer.token_bytes(token));
        self.read.bytes += texts.map(<[u8]>::len).sum::<usize>();
        self.read.tokens += piece.len();
        self.kv_bytes = self.kv_bytes.max(self.state.kv_bytes());
        Ok(())
    }
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
