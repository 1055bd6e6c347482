//! Where the documents of a text end that a command reads piece by piece.

use std::io::BufRead;
use std::path::Path;

use foveal_lm::documents::{Boundary, Documents};

use crate::input;

/// Where documents end: what was read of one is forgotten before the next.
#[derive(Debug, clap::Args)]
#[group(id = "documents", multiple = false)]
pub(crate) struct DocumentArguments {
    /// With --stream, a line of its own between documents, whose predictions and memories begin anew.
    #[arg(long, value_name = "LINE", requires = "stream")]
    separator: Option<String>,

    /// With --stream, each line of the text is an object of JSON, and this member of it a document.
    #[arg(long, value_name = "MEMBER", requires = "stream")]
    jsonl: Option<String>,
}

impl DocumentArguments {
    /// Those of a file, or of standard input for "-".
    pub(crate) fn read(&self, path: &Path) -> anyhow::Result<Documents<Box<dyn BufRead>>> {
        self.of(Box::new(std::io::BufReader::new(input::open(path)?)))
    }

    /// Those of a text.
    pub(crate) fn of<'a>(
        &self,
        text: Box<dyn BufRead + 'a>,
    ) -> anyhow::Result<Documents<Box<dyn BufRead + 'a>>> {
        let boundary = match (&self.separator, &self.jsonl) {
            (Some(separator), _) => {
                let seen = !separator.trim().is_empty() && !separator.contains('\n');
                anyhow::ensure!(
                    seen,
                    "--separator is {separator:?}, a line with something to see is needed"
                );
                Boundary::Line(separator.clone())
            }
            (None, Some(member)) => Boundary::Json(member.clone()),
            (None, None) => Boundary::End,
        };
        Ok(Documents::new(text, boundary))
    }
}
