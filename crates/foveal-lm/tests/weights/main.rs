//! The readers and the writer of model files: hostile files, round trips, and real models.

mod gguf_fields;
mod gguf_hostile;
mod gguf_round_trip;
mod real_models;
mod safetensors;
mod support;
