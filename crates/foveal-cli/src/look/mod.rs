//! `foveal look`: who looks at whom in a text.

mod page;
mod table;

use std::io::{IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::Context;
use foveal_lm::atomic_file;
use foveal_lm::generate::prompt_tokens;
use foveal_lm::look::{Layer, Look, Recalled, Row, Wanted};
use foveal_lm::tokenizer::Tokenizer;
use serde_json::json;

use crate::progress::Progress;
use crate::session::{ModelArguments, Session};
use crate::{input, interrupt, output, source};

/// Show which tokens each head of a model looks at.
///
/// Prints, for one token of the text, the heads that look the hardest at another token than the first and itself, where
/// most heads rest, and how their weights are shared out. --html writes a page with all layers and heads.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The text; "-" reads it from standard input.
    text: String,

    /// The token that looks: the last one that is written so, or the last that such a word ends with; the text's last
    /// one if left out.
    #[arg(long, value_name = "TEXT", conflicts_with = "position")]
    token: Option<String>,

    /// The token that looks, counted from 0.
    #[arg(long, value_name = "N")]
    position: Option<usize>,

    /// Put first the heads that look at this token, the last one before that is written so. With --html and a long text
    /// only the greatest weights of a head count.
    #[arg(long, value_name = "TEXT")]
    to: Option<String>,

    /// So many heads are shown.
    #[arg(long, value_name = "N", default_value_t = 8)]
    top: usize,

    /// So many tokens are shown of each head.
    #[arg(long, value_name = "N", default_value_t = 5)]
    keys: usize,

    /// Show the heads of this layer only, counted from 0.
    #[arg(long, value_name = "N")]
    layer: Option<usize>,

    /// Show the heads of this number only, counted from 0.
    #[arg(long, value_name = "N")]
    head: Option<usize>,

    /// Write a page for a browser that shows all heads and tokens.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArguments,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A text's tokens as they are written, and the one that looks.
#[derive(Debug)]
struct Text {
    labels: Vec<String>,
    chosen: usize,
    /// The token that counts as looked at; any other than the first and the chosen one if there is none.
    to: Option<usize>,
}

/// A head and what the chosen token looks at under it.
#[derive(Debug, Clone, Copy)]
struct Chosen<'a> {
    layer: usize,
    head: usize,
    strength: f32,
    row: &'a Row,
    /// Its name, where it is another than attention to the newest tokens.
    mechanism: Option<&'static str>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.model.run(|session| look(arguments, session))
}

fn look(arguments: &Arguments, session: &Session) -> anyhow::Result<()> {
    let text = match &*arguments.text {
        "-" => input::read("-".as_ref(), "the text")?,
        text => text.to_owned(),
    };
    let tokens = prompt_tokens(&session.tokenizer, &text)?;
    let labels = labels(&session.tokenizer, &tokens);
    let chosen = choose(arguments, &labels)?;
    let to = arguments.to.as_deref().map(|to| find(&labels[..=chosen], to)).transpose()?;
    let text = Text { labels, chosen, to };
    arguments.check(session)?;

    let attention = session.model.config().attention;
    let heads = session.model.config().layers.len() * attention.heads;
    let (rows, cells) = match arguments.html {
        Some(_) => (page::rows(tokens.len(), heads, chosen), page::CELLS),
        None => (vec![chosen], 0),
    };
    // Of many rows few weights are kept; of a single one all.
    let kept = if rows.len() == 1 { tokens.len() } else { page::KEPT.max(arguments.keys) };
    let mut progress = Progress::new("read", tokens.len());
    let wanted = Wanted { cells, rows: rows.clone(), kept };
    let look = Look::at(&session.model, &tokens, &wanted, &mut |done| {
        progress.show(done);
        interrupt::flow()
    })?;
    drop(progress);

    let path = arguments.model.path();
    let file = path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let name = file.unwrap_or_else(|| source::name(path));
    if let Some(path) = &arguments.html {
        write(path, &page::page(&name, &text, &look, &rows))?;
    }
    let at = rows.iter().position(|&row| row == chosen).unwrap_or(0);
    let strongest = strongest(arguments, &look, at, &text);
    if arguments.json {
        return Ok(output::print_json(&as_json(arguments, &text, &strongest))?);
    }
    let colour = coloured();
    let heading = format!(
        "{:?}, token {chosen} of {}, under the strongest {} of {heads} heads of {name}\n",
        text.labels[chosen].trim(),
        text.labels.len(),
        strongest.len(),
    );
    let table = table::table(&text, &strongest, arguments.keys, colour);
    Ok(output::print(&(heading + &table))?)
}

impl Arguments {
    fn check(&self, session: &Session) -> anyhow::Result<()> {
        let config = session.model.config();
        for (flag, given, there) in [
            ("layer", self.layer, config.layers.len()),
            ("head", self.head, config.attention.heads),
        ] {
            if let Some(given) = given {
                let last = there.saturating_sub(1);
                anyhow::ensure!(given < there, "--{flag} is {given}, expected 0 to {last}");
            }
        }
        Ok(())
    }
}

/// Tokens as they are written; what is no whole character is shown as U+FFFD.
fn labels(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<String> {
    let label = |&token| {
        let bytes = tokenizer.token_bytes(token).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    tokens.iter().map(label).collect()
}

/// The token that looks.
fn choose(arguments: &Arguments, labels: &[String]) -> anyhow::Result<usize> {
    if let Some(position) = arguments.position {
        let last = labels.len() - 1;
        anyhow::ensure!(position <= last, "--position is {position}, expected 0 to {last}");
        return Ok(position);
    }
    arguments.token.as_deref().map_or(Ok(labels.len() - 1), |token| find(labels, token))
}

/// The last token that is written so, or that such a word ends with.
fn find(labels: &[String], wanted: &str) -> anyhow::Result<usize> {
    if let Some(position) = labels.iter().rposition(|label| label.trim() == wanted.trim()) {
        return Ok(position);
    }
    let at = labels.concat().rfind(wanted).filter(|_| !wanted.is_empty());
    let at = at.with_context(|| {
        let tokens: Vec<&str> = labels.iter().take(40).map(|label| label.trim()).collect();
        format!("the text has no {wanted:?}; its tokens are {tokens:?}")
    })?;
    let end = at + wanted.len();
    let mut reached = 0;
    let ends = labels.iter().position(|label| {
        reached += label.len();
        reached >= end
    });
    Ok(ends.unwrap_or(labels.len() - 1))
}

/// Whether bars have colours: on terminals, unless the usual variables say otherwise.
fn coloured() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
    !set("NO_COLOR") && (set("CLICOLOR_FORCE") || stdout().is_terminal())
}

/// The heads to show, the strongest first.
fn strongest<'a>(arguments: &Arguments, look: &'a Look, at: usize, text: &Text) -> Vec<Chosen<'a>> {
    let mut heads = Vec::new();
    for (l, layer) in look.layers.iter().enumerate() {
        for (h, head) in layer.heads.iter().enumerate() {
            let asked = arguments.layer.is_none_or(|layer| layer == l)
                && arguments.head.is_none_or(|head| head == h);
            if let Some(row) = head.rows.get(at).filter(|_| asked) {
                let strength = strength(row, text);
                heads.push(Chosen { layer: l, head: h, strength, row, mechanism: named(layer, h) });
            }
        }
    }
    heads.sort_by(|a, b| b.strength.total_cmp(&a.strength));
    heads.truncate(arguments.top);
    heads
}

/// The mechanism of a head whose section has a name.
fn named(layer: &Layer, head: usize) -> Option<&'static str> {
    let mut end = 0;
    let own = layer.sections.iter().find(|section| {
        end += section.heads;
        head < end
    });
    own.map(|section| section.name)
}

/// The weight on the token that counts; else the greatest on another one than the first and the one that looks, and
/// where there is no other, on any.
fn strength(row: &Row, &Text { chosen, to, .. }: &Text) -> f32 {
    let counts = |position| match to {
        Some(to) => position == to,
        None => chosen <= 1 || (position != 0 && position != chosen),
    };
    let counted = row.weights.iter().filter(|(position, _)| counts(*position));
    counted.map(|(_, weight)| weight.abs()).fold(0.0, f32::max)
}

fn as_json(arguments: &Arguments, text: &Text, heads: &[Chosen<'_>]) -> serde_json::Value {
    let heads = heads.iter().map(|Chosen { layer, head, strength, row, mechanism }| {
        let weights = row.weights.iter().take(arguments.keys.max(1)).map(|&(position, weight)| {
            json!({ "position": position, "token": text.labels[position], "weight": weight })
        });
        let recalled = row.recalled.as_ref().map(|Recalled { gate, segment, entries }| {
            json!({ "gate": gate, "segment": segment, "entries": entries })
        });
        json!({
            "layer": layer,
            "head": head,
            "mechanism": mechanism,
            "strength": strength,
            "entropy": row.entropy,
            "sum": row.sum,
            "weights": weights.collect::<Vec<_>>(),
            "recalled": recalled,
        })
    });
    json!({
        "tokens": text.labels,
        "position": text.chosen,
        "token": text.labels[text.chosen],
        "heads": heads.collect::<Vec<_>>(),
    })
}

fn write(path: &Path, page: &str) -> anyhow::Result<()> {
    let written = atomic_file::write(path, |out| out.write_all(page.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

impl Text {
    /// A token without what a line can't show.
    fn shown(&self, position: usize) -> String {
        match self.labels[position].trim() {
            "" => format!("{:?}", self.labels[position]),
            label => label.to_owned(),
        }
    }
}
