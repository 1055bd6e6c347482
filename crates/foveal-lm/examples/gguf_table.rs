//! Prints the metadata and the tensors of a model: `cargo run --release -p foveal-lm --example gguf_table FILE`.

use std::process::ExitCode;

use foveal_lm::weights::gguf::Value;
use foveal_lm::weights::{Description, Error, Weights};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: gguf_table MODEL");
        return ExitCode::from(2);
    };
    match Weights::open(path.as_ref()).and_then(|weights| print(&weights)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn print(weights: &Weights) -> Result<(), Error> {
    if let Description::Gguf(metadata) = weights.description() {
        for key in metadata.keys() {
            match metadata.require(key)? {
                Value::Str(text) => {
                    println!("{key} = {:?}", text.chars().take(60).collect::<String>())
                }
                value => println!("{key} = {value}"),
            }
        }
    }
    for tensor in weights.tensors() {
        let bytes = tensor.bytes.map_or("?".to_owned(), |bytes| bytes.to_string());
        println!(
            "{:<32} {:<8} {:>16} {bytes:>10} bytes @ {}",
            tensor.name,
            tensor.element.to_string(),
            format!("{:?}", tensor.shape),
            tensor.offset
        );
    }
    Ok(())
}
