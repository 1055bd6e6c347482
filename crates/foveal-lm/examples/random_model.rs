//! Writes a model with random weights whose layers are mixed as asked for, to measure bits, memory and time.
//!
//! ```text
//! cargo run --release -p foveal-lm --example random_model -- FOLDER '{"name": "infini", "segment": 2048}'
//! foveal eval --model FOLDER --text FILE --stream
//! ```
//!
//! Four layers of width 256 with 4 heads, inner width 1024; tokens are bytes. A list of mixers has one for each layer.

use foveal::projection::Format;
use foveal_lm::testing::{Tiny, TinySizes, byte_tokenizer};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, mixer] = arguments.as_slice() else {
        return Err("give a folder and a mixer as in config.json".into());
    };
    let mixer: serde_json::Value = serde_json::from_str(mixer)?;
    let sizes = TinySizes {
        width: 256,
        inner: 1024,
        heads: 4,
        kv_heads: 4,
        head_dim: 64,
        vocab: 256,
        layers: 4,
    };
    let folder = Path::new(folder);
    Tiny::mixed(sizes, &mixer, 2048).save_folder(folder, Format::F32, 1)?;
    std::fs::write(folder.join("tokenizer.json"), byte_tokenizer().to_string())?;
    println!("{} has layers of {mixer}", folder.display());
    Ok(())
}
