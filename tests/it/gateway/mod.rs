//! The HTTP API, its pages, and what stands in front of it.

mod bombs;
mod caches;
mod docs_page;
mod import;
mod openapi;
mod page;
mod strict;
mod upstream;
