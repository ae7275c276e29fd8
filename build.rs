//! Compiles the proto without `protoc` (protox is a compiler in Rust) and keeps the descriptor set
//! for server reflection.

use std::{env, fs, path::PathBuf};

use tonic_prost_build::Config;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=migrations");
    let descriptors = protox::compile(["dnc/v1/dnc.proto"], ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("dnc.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .codec_path("crate::wire::codec::SliceCodec")
        .compile_fds_with_config(descriptors, Config::new())?;
    Ok(())
}
