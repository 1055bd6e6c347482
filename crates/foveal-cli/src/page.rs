//! A page of one file, which needs nothing from elsewhere: no script, font or picture.

use crate::chart::escaped;

const SHELL: &str = include_str!("page.html");

/// A page of a title, styles besides the usual ones, and what is in it.
pub(crate) fn page(title: &str, style: &str, content: &str) -> String {
    let parts =
        [("<!--TITLE-->", &*escaped(title)), ("/*STYLE*/", style), ("<!--CONTENT-->", content)];
    let mut text = String::new();
    let mut rest = SHELL;
    for (place, part) in parts {
        let (before, after) = rest.split_once(place).unwrap_or((rest, ""));
        text.extend([before, part]);
        rest = after;
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_in_its_place() {
        let text = page("a < b", "p { }", "<p>/*STYLE*/</p>");
        assert!(text.contains("<title>a &lt; b</title>") && text.contains("\np { }\n</style>"));
        assert!(text.contains("<body>\n<p>/*STYLE*/</p>\n</body>"));
    }
}
