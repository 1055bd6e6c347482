//! A model's chat template: a Jinja program that writes messages down as the model was trained to read them.
//!
//! ```text
//! messages, add_generation_prompt, bos_token, eos_token → text
//! ```
//!
//! Templates come with the model's file, so they are strangers' programs: they run in a sandbox that reads no file and
//! no variable of the system, and end with an error once they have used up [`FUEL`], which pays for steps and for bytes
//! alike, or call themselves too deeply. They run as `transformers` runs them: blocks' line ends and indents are
//! trimmed, strings have Python's methods, `{% break %}` and `{% continue %}` are there.

use std::path::Path;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, context};

use super::{Message, functions};
use crate::Error;
use crate::tokenizer::{self, Tokenizer};
use crate::weights::{Description, Weights};

/// What a rendering may spend: about one a step, and one for each 64 bytes that it makes or reads.
const FUEL: u64 = 4_000_000;
/// The longest template that is read; real ones have up to 20 thousand bytes.
const MAX_BYTES: usize = 1 << 20;
/// How deep macros may call each other.
const RECURSION: usize = 200;
/// A stack on which neither the parser nor a value of [`FUEL`] levels overflows. Only what is used takes memory.
const STACK: usize = 256 << 20;

/// For models that were not made for chats: names before what each said.
const PLAIN: &str = "\
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content | trim ~ '\n\n' }}
{%- else %}{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}";

/// A template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like: marks that templates write.
    marks: Vec<(&'static str, String)>,
    stop: Vec<String>,
}

impl ChatTemplate {
    /// The template of a model's file, or of the folder `path`; `None` if the model has none.
    ///
    /// # Errors
    ///
    /// [`Error::Weights`] and [`Error::Tokenizer`] when a file can't be read, and those of [`ChatTemplate::new`].
    pub fn open(
        weights: &Weights,
        path: Option<&Path>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>, Error> {
        let source = match (weights.description(), path) {
            (Description::Gguf(metadata), _) => {
                metadata.get::<&str>("tokenizer.chat_template")?.map(str::to_owned)
            }
            (Description::Config(_), Some(folder)) => in_folder(folder)?,
            _ => None,
        };
        source.map(|source| ChatTemplate::new(&source, tokenizer)).transpose()
    }

    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] when it is no template.
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, Error> {
        let mark = |token: Option<u32>| {
            let bytes = tokenizer.token_bytes(token?)?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        let marks = [
            ("bos_token", tokenizer.bos()),
            ("eos_token", tokenizer.eos()),
            ("unk_token", tokenizer.unknown()),
            ("pad_token", tokenizer.padding()),
        ];
        let marks = marks.into_iter().filter_map(|(name, token)| Some((name, mark(token)?)));
        ChatTemplate::assemble(source, marks.collect(), SystemTime::now)
    }

    fn assemble(
        source: &str,
        marks: Vec<(&'static str, String)>,
        clock: fn() -> SystemTime,
    ) -> Result<ChatTemplate, Error> {
        if source.len() > MAX_BYTES {
            let reason = format!("it has {} bytes, at most {MAX_BYTES} expected", source.len());
            return Err(Error::Template { reason });
        }
        let source = without_generation_tags(source);
        let environment = on_large_stack(move || {
            let mut environment = Environment::new();
            environment.set_syntax(
                SyntaxConfig::builder()
                    .trim_blocks(true)
                    .lstrip_blocks(true)
                    .build()
                    .map_err(|error| wrong(&error))?,
            );
            environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
            environment
                .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
            environment.set_fuel(Some(FUEL));
            environment.set_recursion_limit(RECURSION);
            functions::add_to(&mut environment, clock);
            let added = environment.add_template_owned("chat", source);
            added.map_err(|error| wrong(&error))?;
            Ok(environment)
        })?;
        Ok(ChatTemplate { environment, marks, stop: Vec::new() })
    }

    /// For models that have no template: a line with `User:` or `Assistant:` before what each said. What the model says
    /// ends where it writes a line for the user.
    ///
    /// # Errors
    ///
    /// None that is known.
    pub fn plain() -> Result<ChatTemplate, Error> {
        let template = ChatTemplate::assemble(PLAIN, Vec::new(), SystemTime::now)?;
        Ok(ChatTemplate { stop: vec!["\nUser:".to_owned()], ..template })
    }

    /// Strings at which an answer ends, besides the model's own end tokens.
    pub fn stop(&self) -> &[String] {
        &self.stop
    }

    /// The text of `messages`; with `prompt`, up to where the model's answer begins.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] with the template's own words if it refuses the messages, or if it fails or uses up its fuel.
    pub fn render(&self, messages: &[Message], prompt: bool) -> Result<String, Error> {
        on_large_stack(|| {
            let template = self.environment.get_template("chat").map_err(|error| wrong(&error))?;
            let marks = Value::from_pairs(self.marks.iter().map(|(name, mark)| (*name, mark)));
            let messages = messages.iter().map(|Message { role, content }| {
                Value::from_pairs([("role", role.name()), ("content", content)])
            });
            let messages: Value = messages.collect();
            let context = context! { messages, add_generation_prompt => prompt, ..marks };
            template.render(context).map_err(|error| wrong(&error))
        })
    }
}

/// Drops of values recurse as deep as they are nested, as does the parser: templates get a stack of their own.
fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let failed = |reason: String| Error::Template { reason };
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().stack_size(STACK);
        let thread = builder.spawn_scoped(scope, work);
        let thread = thread.map_err(|error| failed(format!("no thread to run it: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(failed("it makes its interpreter fail".to_owned())))
    })
}

fn wrong(error: &minijinja::Error) -> Error {
    let mut reason = match error.detail() {
        Some(detail) if error.kind() == minijinja::ErrorKind::InvalidOperation => detail.to_owned(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    if let Some(line) = error.line() {
        reason += &format!(" (line {line})");
    }
    Error::Template { reason }
}

/// `{% generation %}` marks what a model says, for training; it changes no text.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, later) = tag.split_at(end);
        match tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim() {
            "generation" => text.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endif")),
            _ => text.push_str(tag),
        }
        rest = later;
    }
    text + rest
}

/// `chat_template.jinja`, or the `chat_template` of `tokenizer_config.json`: a text, or a list of named ones.
fn in_folder(folder: &Path) -> Result<Option<String>, Error> {
    if let Some(bytes) = read(&folder.join("chat_template.jinja"))? {
        let template = String::from_utf8(bytes);
        return template
            .map(Some)
            .map_err(|_| Error::Template { reason: "chat_template.jinja is not UTF-8".into() });
    }
    let Some(bytes) = read(&folder.join("tokenizer_config.json"))? else { return Ok(None) };
    let config: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| tokenizer::Error::HuggingFace { reason: error.to_string() })?;
    let template = &config["chat_template"];
    let named = |name: &str| {
        let list = template.as_array()?;
        list.iter().find(|entry| entry["name"] == name)?["template"].as_str()
    };
    Ok(template.as_str().or_else(|| named("default")).map(str::to_owned))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(tokenizer::Error::Io { path: path.to_owned(), source }.into()),
    }
}

#[cfg(test)]
mod tests;
