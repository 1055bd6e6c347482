#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foveal_fuzz_bodies::model(bytes));
