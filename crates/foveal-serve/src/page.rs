//! The page: plain modules that are part of the program, so that it works without a network.

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use crate::api::App;

/// A file: its address, its kind, its text.
struct Asset {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! asset {
    ($path:literal, $kind:ident, $file:literal) => {
        Asset { path: $path, kind: $kind, text: include_str!(concat!("../page/", $file)) }
    };
}

const ASSETS: &[Asset] = &[
    asset!("/", HTML, "index.html"),
    asset!("/page/style.css", STYLE, "style.css"),
    asset!("/page/main.js", SCRIPT, "main.js"),
    asset!("/page/api.js", SCRIPT, "api.js"),
    asset!("/page/talk.js", SCRIPT, "talk.js"),
    asset!("/page/answer.js", SCRIPT, "answer.js"),
    asset!("/page/chat.js", SCRIPT, "chat.js"),
    asset!("/page/draft.js", SCRIPT, "draft.js"),
    asset!("/page/look.js", SCRIPT, "look.js"),
    asset!("/page/maps.js", SCRIPT, "maps.js"),
    asset!("/page/mechanisms.js", SCRIPT, "mechanisms.js"),
    asset!("/page/colour.js", SCRIPT, "colour.js"),
];

/// Whether a path is a file of the page: those need no key, as there is nothing in them.
pub(crate) fn is_asset(path: &str) -> bool {
    ASSETS.iter().any(|asset| asset.path == path)
}

/// The addresses of the page's files.
pub(crate) fn routes(router: Router<App>) -> Router<App> {
    ASSETS.iter().fold(router, |router, asset| {
        router.route(asset.path, get(move |headers: HeaderMap| async move { asset.give(&headers) }))
    })
}

impl Asset {
    /// The file, or that it is still what the browser has.
    fn give(&self, headers: &HeaderMap) -> Response {
        let hash = Sha256::digest(self.text);
        let tag: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let tag = format!("\"{tag}\"");
        let known = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known == tag.as_str());
        let head = [(header::ETAG, tag), (header::CACHE_CONTROL, "no-cache".to_owned())];
        if known {
            return (StatusCode::NOT_MODIFIED, head).into_response();
        }
        (head, [(header::CONTENT_TYPE, self.kind)], self.text).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_nothing_of_it_is_elsewhere() {
        let bytes: usize = ASSETS.iter().map(|asset| asset.text.len()).sum();
        assert!(bytes <= 200 << 10, "{bytes}");
        for asset in ASSETS {
            for word in ["http://", "https://", "//cdn", "@import", "url(", "style=\"", "onclick"] {
                assert!(!asset.text.contains(word), "{}: {word}", asset.path);
            }
        }
    }

    #[test]
    fn every_file_that_is_named_is_there() {
        for asset in ASSETS {
            let named =
                asset.text.split(['"', '\'']).filter_map(|part| match part.strip_prefix("./") {
                    Some(name) if asset.kind == SCRIPT => Some(format!("/page/{name}")),
                    _ => part.starts_with("/page/").then(|| part.to_owned()),
                });
            for path in named.filter(|path| path.ends_with(".js") || path.ends_with(".css")) {
                assert!(is_asset(&path), "{}: {path}", asset.path);
            }
        }
    }
}
