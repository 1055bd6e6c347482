//! What this workspace's tests and benches share. Not part of the public interface.

mod models;

pub use models::{Model, fetch_model};
