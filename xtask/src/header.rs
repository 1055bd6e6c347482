//! `crates/foveal-c/include/foveal.h`, made of the crate's types, functions and doc comments by cbindgen.

use crate::run;
use anyhow::{Context, Result, bail};
use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};
use std::fs;

/// Files with what the header shows, in its order.
const SOURCES: &[&str] = &["error.rs", "types.rs", "workspace.rs", "call.rs"];

const ABOUT: &str = "\
/* Foveal: attention for CPUs, exact and fast. The C interface.
 *
 * Made by `cargo xtask docs` from crates/foveal-c; changes belong there.
 *
 * Tensors are [batch, seq, heads, dim] with strides in elements. Structs of zeros mean nothing, or the default, so
 * that members which a caller does not know stay out of the way. Calls return a status, and write nothing unless it
 * is FOVEAL_OK; foveal_last_error_message() says why in words. All memory but a workspace belongs to the caller, and
 * nothing is kept after a call. Calls may run on several threads at once; they share the threads of one pool, whose
 * number the environment variable RAYON_NUM_THREADS sets.
 *
 * Numbers are checked: NULL, alignment, extents, strides, overlap. That a pointer points to as much memory as its
 * struct says cannot be checked, and is the caller's promise.
 */";

/// Writes the header, or refuses one that is not what the crate says.
pub(crate) fn update(check: bool) -> Result<()> {
    let path = run::root().join("crates/foveal-c/include/foveal.h");
    let fresh = text()?;
    if fs::read_to_string(&path).is_ok_and(|text| text == fresh) {
        return Ok(());
    }
    if check {
        bail!(
            "crates/foveal-c/include/foveal.h is not what the crate says; run `cargo xtask docs`"
        );
    }
    fs::write(&path, fresh).context("crates/foveal-c/include/foveal.h")
}

fn text() -> Result<String> {
    let config = Config {
        language: Language::C,
        cpp_compat: true,
        include_guard: Some("FOVEAL_H".to_owned()),
        header: Some(ABOUT.to_owned()),
        style: Style::Both,
        usize_is_size_t: true,
        documentation_style: DocumentationStyle::Cxx,
        no_includes: true,
        sys_includes: vec!["stddef.h".to_owned(), "stdint.h".to_owned()],
        ..Config::default()
    };
    let folder = run::root().join("crates/foveal-c/src");
    let builder = Builder::new().with_config(config);
    let builder = SOURCES.iter().fold(builder, |builder, file| builder.with_src(folder.join(file)));
    let mut bytes = vec![];
    builder.generate().context("cbindgen")?.write(&mut bytes);
    Ok(String::from_utf8(bytes)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_header_is_what_the_crate_says() {
        super::update(true).unwrap();
    }

    /// Everything exported by name is declared, and nothing is declared that is a detail.
    #[test]
    fn the_header_declares_every_function() {
        let text = super::text().unwrap();
        let is_code = |line: &&str| !line.trim_start().starts_with(['/', '*']);
        let code = text.lines().filter(is_code).collect::<Vec<_>>().join("\n");
        for function in [
            "foveal_attention_forward(",
            "foveal_attention_decode(",
            "foveal_attention_backward(",
            "foveal_attention_default(",
            "foveal_tensor_dense(",
            "foveal_workspace_create(",
            "foveal_workspace_free(",
            "foveal_last_error_message(",
            "foveal_version(",
        ] {
            assert_eq!(code.matches(function).count(), 1, "{function}");
        }
        assert!(!code.contains("Mutex") && !code.contains("Pointers"));
    }
}
