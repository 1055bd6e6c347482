//! The server over loopback: what clients get, and what they can't do.

mod hostile;
mod leaving;
mod look;
mod requests;
mod streams;
mod support;
mod who;
