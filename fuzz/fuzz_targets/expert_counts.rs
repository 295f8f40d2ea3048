#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| pomona_hostile::run("expert_counts", data));
