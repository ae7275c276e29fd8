//! The cost of a check compared with the bare statement that it sends, in one run. Only the ratios
//! count: absolute figures depend on the machine.
//!
//! The rounds of both sides alternate, so that a change in the machine's speed affects both.

#[allow(unreachable_pub, dead_code, reason = "shared by several programs")]
mod support;

use std::{sync::Arc, time::Instant};

use dnc::proto::{CheckEntriesRequest, dnc_service_client::DncServiceClient};
use support::{BareChecks, Database, Service, median};
use tokio::task::JoinSet;
use tonic::{Request, transport::Channel};

const ROWS: u64 = 1_000_000;
const ROUNDS: usize = 300;
/// A new database session is slow until it has read most pages of the table, and each side has its
/// own session.
const WARM_UP_ROUNDS: usize = 60;
const CONCURRENCY: usize = 16;
const SINGLE_CHECKS: usize = 8_000;
fn main() -> anyhow::Result<()> {
    // In a task, as in a client: a hand-over between threads costs as much as a small statement.
    tokio::runtime::Runtime::new()?.block_on(async { tokio::spawn(run()).await? })
}

async fn run() -> anyhow::Result<()> {
    let database = Database::start().await?;
    let (service, _store) = Service::start(&database.url).await?;
    let bare = BareChecks::connect(&database.url, CONCURRENCY as u32, service.workspace).await?;
    bare.fill(ROWS).await?;
    let client = DncServiceClient::connect(service.grpc_url.clone()).await?;
    let sides = Arc::new(Sides { bare, client: client.clone(), key: service.key });

    let (mut bare, mut checked) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP_ROUNDS + ROUNDS {
        let emails = emails(round * 1_000..(round + 1) * 1_000);
        let mut seconds = [0.0; 2];
        // The first side finds the pages cold, so the order alternates.
        for side in if round % 2 == 0 { [Side::Statement, Side::Check] } else { [Side::Check, Side::Statement] } {
            let emails = emails.clone();
            let started = Instant::now();
            match side {
                Side::Statement => sides.bare.check(&emails).await?,
                Side::Check => sides.check(&client, emails).await?,
            };
            seconds[side as usize] = started.elapsed().as_secs_f64();
        }
        if round >= WARM_UP_ROUNDS {
            bare.push(seconds[Side::Statement as usize]);
            checked.push(seconds[Side::Check as usize]);
        }
    }
    let (bare, checked) = (median(bare) * 1_000.0, median(checked) * 1_000.0);
    println!("bulk check of 1,000   statement {bare:8.2} ms   check {checked:8.2} ms   ratio {:5.2} (at most 1.3)", checked / bare);

    let (mut bare, mut checked) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        bare.push(rate(&sides, Side::Statement).await?);
        checked.push(rate(&sides, Side::Check).await?);
    }
    let (bare, checked) = (median(bare), median(checked));
    println!(
        "single checks, {CONCURRENCY} at once   statement {bare:8.0} /s   check {checked:8.0} /s   ratio {:5.2} (at least 0.5)",
        checked / bare
    );
    drop(database.postgres);
    Ok(())
}

fn emails(numbers: std::ops::Range<usize>) -> Vec<String> {
    // Every second address is on the list.
    numbers.map(|n| BareChecks::email(n as u64 * 7919 % (2 * ROWS))).collect()
}

struct Sides {
    bare: BareChecks,
    client: DncServiceClient<Channel>,
    key: String,
}

#[derive(Clone, Copy)]
enum Side {
    Statement,
    Check,
}

impl Sides {
    async fn check(&self, client: &DncServiceClient<Channel>, emails: Vec<String>) -> anyhow::Result<usize> {
        let mut request = Request::new(CheckEntriesRequest { emails });
        request.metadata_mut().insert("x-api-key", self.key.parse()?);
        let answer = client.clone().check_entries(request).await?.into_inner();
        Ok(answer.results.iter().filter(|result| result.suppressed).count())
    }
}

async fn rate(sides: &Arc<Sides>, side: Side) -> anyhow::Result<f64> {
    let started = Instant::now();
    let mut tasks: JoinSet<anyhow::Result<usize>> = JoinSet::new();
    for task in 0..CONCURRENCY {
        let sides = sides.clone();
        tasks.spawn(async move {
            let client = sides.client.clone();
            let mut found = 0;
            for number in 0..SINGLE_CHECKS / CONCURRENCY {
                let emails = emails(task * 100_000 + number..task * 100_000 + number + 1);
                found += match side {
                    Side::Statement => sides.bare.check(&emails).await?,
                    Side::Check => sides.check(&client, emails).await?,
                };
            }
            Ok(found)
        });
    }
    for found in tasks.join_all().await {
        found?;
    }
    Ok(SINGLE_CHECKS as f64 / started.elapsed().as_secs_f64())
}
