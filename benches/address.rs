//! The cost of the canonical form of an address. An ordinary address must stay below 300 ns.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use dnc::domain::{Address, Kind};

fn addresses(criterion: &mut Criterion) {
    let cases = [
        ("ordinary", Kind::Email, "firstname.lastname+tag@mail.example.com"),
        ("ordinary, upper case", Kind::Email, "FirstName.LastName@Example.COM"),
        ("surrounded by space", Kind::Email, " firstname.lastname@example.com\r\n"),
        ("Unicode local part", Kind::Email, "jürgen.müller@example.de"),
        ("Unicode domain", Kind::Email, "info@münchen.de"),
        ("domain entry", Kind::Domain, "mail.badcompany.com"),
    ];
    let mut group = criterion.benchmark_group("address");
    for (name, kind, text) in cases {
        group.bench_function(name, |bencher| {
            bencher.iter_batched(|| text.to_owned(), |text| Address::parse(kind, black_box(text)), BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, addresses);
criterion_main!(benches);
