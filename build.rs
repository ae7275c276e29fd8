//! Compiles the proto without `protoc` (protox is a compiler in Rust) and keeps the descriptor set
//! for server reflection. Unpacks Swagger UI, which the page at `/docs` is made of.

use std::{
    env, fs,
    io::{Cursor, Read},
    path::{Path, PathBuf},
};

use tonic_prost_build::Config;
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::{CompressionMethod, ZipArchive};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=migrations");
    let descriptors = protox::compile(["dnc/v1/dnc.proto"], ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("dnc.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .codec_path("crate::wire::codec::SliceCodec")
        .compile_fds_with_config(descriptors, Config::new())?;
    unpack_swagger_ui(&out_dir)
}

/// Writes the two files that a page needs as gzip files. Their data in the archive is compressed
/// in the same way, so it only gets the head and the end of a gzip file (RFC 1952).
fn unpack_swagger_ui(out_dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut archive = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    for name in ["swagger-ui-bundle.js", "swagger-ui.css"] {
        let end = format!("/dist/{name}");
        let mut paths = archive.file_names_raw();
        let index = paths.position(|path| path.ends_with(end.as_bytes())).ok_or_else(|| format!("Swagger UI has no {name}"))?;
        drop(paths);
        let mut file = archive.by_index_raw(index)?;
        if file.compression() != CompressionMethod::DEFLATE {
            return Err(format!("{name} is compressed in a way that gzip does not know").into());
        }
        let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
        file.read_to_end(&mut gzip)?;
        gzip.extend(file.crc32().to_le_bytes());
        gzip.extend(u32::try_from(file.size())?.to_le_bytes());
        fs::write(out_dir.join(format!("{name}.gz")), gzip)?;
    }
    Ok(())
}
