//! `foveal chat`: a conversation.

use std::io::{BufRead, IsTerminal, Read, stdin, stdout};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use foveal_lm::atomic_file;
use foveal_lm::chat::{Answer, ChatTemplate, Conversation, Event, Role};
use foveal_lm::generate::{Options, StopReason};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::kv::KvArguments;
use crate::progress::Progress;
use crate::sampling::SamplingArguments;
use crate::session::{ModelArguments, Session};
use crate::{interrupt, numbers, output, source};

/// The longest line that is read.
const MAX_LINE: u64 = 16 << 20;

const HELP: &str = "\
/help             this list
/reset            forget what was said; the system's message stays
/system [TEXT]    set what the model is told before all else, or show it
/regenerate       answer the last message once more
/save FILE        write the messages to a file, as JSON
/quit             leave; so does Ctrl-D, or Ctrl-C twice
A line that ends with \\ goes on with the next. // begins a message with one /. Ctrl-C breaks an answer off.";

/// Talk with a model.
///
/// Every line of input is a message; the model answers as its chat template has it. Earlier messages are not read
/// again. /help lists the commands. Without a terminal, standard output has one answer after the other.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,

    /// Tell the model this before all else.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// The most tokens of an answer.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1024)]
    max_tokens: usize,

    /// Write "User:" and "Assistant:" before messages instead of filling in the model's chat template.
    #[arg(long)]
    plain: bool,

    /// Say after each answer on standard error what it took.
    #[arg(long)]
    figures: bool,

    #[command(flatten)]
    sampling: SamplingArguments,

    #[command(flatten)]
    kv: KvArguments,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.model.run(|session| {
        let template = arguments.template(session)?;
        let state = arguments.kv.state(&session.model)?;
        let mut conversation =
            Conversation::new(&session.model, &session.tokenizer, &template, state);
        conversation.set_system(arguments.system.as_deref().unwrap_or_default());
        Chat { arguments, session, conversation, answers: 0, warned: false }.run()
    })
}

impl Arguments {
    fn template(&self, session: &Session) -> anyhow::Result<ChatTemplate> {
        if self.plain {
            return Ok(ChatTemplate::plain()?);
        }
        let path = self.model.path();
        let template = ChatTemplate::open(&session.weights, path, &session.tokenizer)?;
        template.with_context(|| {
            let name = source::name(path);
            format!(
                "{name} has no chat template, so it was hardly made for chats; --plain writes \
                 \"User:\" and \"Assistant:\" before messages instead"
            )
        })
    }

    fn options(&self, answer: u64) -> Options {
        let mut sampling = self.sampling.sampling();
        // Another answer to the same message is another one.
        sampling.seed = sampling.seed.wrapping_add(answer);
        Options { max_tokens: self.max_tokens, sampling, ..Options::default() }
    }
}

/// A line of input.
enum Line {
    Text(String),
    /// Ctrl-C instead of a line.
    Interrupted,
    End,
}

struct Chat<'a> {
    arguments: &'a Arguments,
    session: &'a Session,
    conversation: Conversation<'a>,
    answers: u64,
    warned: bool,
}

impl Chat<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        let mut lines = Lines::new()?;
        let mut interrupted = false;
        loop {
            match lines.next()? {
                Line::End => return Ok(()),
                Line::Interrupted if interrupted => return Ok(()),
                Line::Interrupted => {
                    interrupted = true;
                    output::note("Ctrl-C again or Ctrl-D leaves");
                }
                Line::Text(line) => {
                    interrupted = false;
                    if self.take(&line)?.is_break() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Does what a line says.
    fn take(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let Some(command) = line.strip_prefix('/').filter(|rest| !rest.starts_with('/')) else {
            let message = if line.starts_with("//") { &line[1..] } else { line };
            if !message.trim().is_empty() {
                self.conversation.say(message);
                self.answer()?;
            }
            return Ok(ControlFlow::Continue(()));
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help", _) => output::note(HELP),
            ("reset", _) => self.conversation.reset(),
            ("system", "") => self.show_system(),
            ("system", text) => self.conversation.set_system(text),
            ("regenerate", _) => self.regenerate()?,
            ("save", "") => output::note("/save needs a file's name"),
            ("save", file) => self.save(Path::new(file)),
            ("quit" | "exit", _) => return Ok(ControlFlow::Break(())),
            _ => output::note(&format!(
                "there is no command /{}; /help lists them",
                output::one_line(name)
            )),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn show_system(&self) {
        let messages = self.conversation.messages().first();
        match messages.filter(|message| message.role == Role::System) {
            Some(message) => output::note(&message.content),
            None => output::note("there is no system message"),
        }
    }

    fn regenerate(&mut self) -> anyhow::Result<()> {
        self.conversation.take_back(Role::Assistant);
        match self.conversation.messages().last() {
            Some(message) if message.role == Role::User => self.answer(),
            _ => {
                output::note("there is no message to answer");
                Ok(())
            }
        }
    }

    /// A file that can't be written does not end the conversation.
    fn save(&self, file: &Path) {
        let messages = serde_json::to_vec_pretty(self.conversation.messages());
        let saved = messages.map_err(std::io::Error::from).and_then(|messages| {
            atomic_file::write(file, |out| std::io::Write::write_all(out, &messages))
        });
        let name = output::one_line(&file.display().to_string());
        match saved {
            Ok(()) => output::note(&format!("saved to {name}")),
            Err(error) => output::note(&format!("cannot write {name}: {error}")),
        }
    }

    fn answer(&mut self) -> anyhow::Result<()> {
        interrupt::done();
        let options = self.arguments.options(self.answers);
        self.answers += 1;
        let (start, mut begun) = (Instant::now(), None);
        let mut progress: Option<Progress> = None;
        let mut broken = None;
        let answer = self.conversation.answer(&options, &mut |event| {
            match event {
                Event::Read { done, total } if done < total => {
                    progress.get_or_insert_with(|| Progress::new("read", total)).show(done);
                }
                Event::Text(text) => {
                    begun.get_or_insert_with(Instant::now);
                    if let Err(error) = output::print(text) {
                        broken = Some(error);
                        return ControlFlow::Break(());
                    }
                }
                _ => progress = None,
            }
            interrupt::flow()
        });
        drop(progress);
        interrupt::done();
        if let Some(error) = broken {
            return Err(error.into());
        }
        let answer = match answer {
            Ok(answer) => answer,
            // The template may refuse a message, such as a system's: that one is taken back.
            Err(error @ foveal_lm::Error::Template { .. }) => {
                self.conversation.take_back(Role::User);
                output::note(&format!("foveal: {}", output::sentence(&error.into())));
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        output::print("\n")?;
        self.comment(&answer, start, begun.unwrap_or_else(Instant::now));
        Ok(())
    }

    /// What there is to say about an answer.
    fn comment(&mut self, answer: &Answer, start: Instant, begun: Instant) {
        match answer.stop {
            None => {
                // What was not answered at all was not said.
                self.conversation.take_back(Role::User);
                output::note("(interrupted)");
            }
            Some(StopReason::MaxTokens) => {
                let limit = self.arguments.max_tokens;
                output::note(&format!("(ended after {limit} tokens; -n allows more)"));
            }
            Some(_) => {}
        }
        let (tokens, context) =
            (self.conversation.state().position(), self.session.model.config().context);
        if tokens > context && !self.warned {
            self.warned = true;
            self.arguments.kv.warn(&self.session.model, tokens);
        }
        if self.arguments.figures {
            let (read, made) = (begun - start, begun.elapsed());
            output::note(&format!(
                "held: {} tokens; read: {}, {:.1} tok/s; made: {}, {:.1} tok/s; {} of keys and values",
                answer.held,
                answer.read,
                numbers::rate(answer.read, read.as_secs_f64()),
                answer.made,
                numbers::rate(answer.made.saturating_sub(1), made.as_secs_f64()),
                numbers::bytes(self.conversation.state().kv_bytes()),
            ));
        }
    }
}

/// Lines of a terminal, which can be edited, or of anything else.
enum Lines {
    Terminal(Box<DefaultEditor>),
    Other,
}

impl Lines {
    fn new() -> anyhow::Result<Lines> {
        if !stdin().is_terminal() || !stdout().is_terminal() {
            return Ok(Lines::Other);
        }
        output::note("/help lists commands; Ctrl-D leaves");
        Ok(Lines::Terminal(Box::new(DefaultEditor::new().context("cannot use the terminal")?)))
    }

    /// The next line, together with those that it says it goes on with.
    fn next(&mut self) -> anyhow::Result<Line> {
        let mut text = String::new();
        loop {
            match self.next_single(text.is_empty())? {
                Line::Text(line) => {
                    text.push_str(&line);
                    if !line.ends_with('\\') {
                        break;
                    }
                    text.pop();
                    text.push('\n');
                }
                Line::End if !text.is_empty() => break,
                other => return Ok(other),
            }
        }
        if let Lines::Terminal(editor) = self {
            // A history that is full is no reason to stop.
            let _ = editor.add_history_entry(&text);
        }
        Ok(Line::Text(text))
    }

    fn next_single(&mut self, first: bool) -> anyhow::Result<Line> {
        match self {
            Lines::Terminal(editor) => match editor.readline(if first { "> " } else { ". " }) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(error).context("cannot read the terminal"),
            },
            Lines::Other => next_line(),
        }
    }
}

fn next_line() -> anyhow::Result<Line> {
    let mut line = Vec::new();
    let mut input = stdin().lock().take(MAX_LINE + 1);
    input.read_until(b'\n', &mut line).context("cannot read standard input")?;
    anyhow::ensure!(
        line.len() as u64 <= MAX_LINE,
        "a line of standard input is longer than 16 MiB"
    );
    if line.is_empty() {
        return Ok(Line::End);
    }
    let line = String::from_utf8(line)
        .context("a line of standard input is not UTF-8; convert it first")?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(Line::Text(line.strip_suffix('\r').unwrap_or(line).to_owned()))
}
