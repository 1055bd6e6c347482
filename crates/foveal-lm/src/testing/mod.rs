//! What this workspace's tests and benches share. Not part of the public interface.

mod models;
mod sources;

pub use models::{Model, fetch_model};
pub use sources::fetch_vocabularies;
