//! What the service does when the link to its database, the database itself or its callers fail; and that nothing is left behind afterwards.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::harness::{Flow, Proxy, until};

/// A server that sends everything back, with `mark` before each piece.
async fn echo(mark: u8) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("tcp://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut byte = [mark, 0];
                while connection.read_exact(&mut byte[1..]).await.is_ok() && connection.write_all(&byte).await.is_ok() {}
            });
        }
    });
    url
}

#[tokio::test]
async fn the_link_of_these_tests_does_what_is_asked_of_it() {
    let (first, second) = (echo(b'1').await, echo(b'2').await);
    let link = Proxy::to(&first).await;
    let address = link.url(&first).trim_start_matches("tcp://").to_owned();
    let connect = || async { TcpStream::connect(&address).await.unwrap() };
    let moment = Duration::from_millis(200);
    let answer = async |connection: &mut TcpStream| {
        let mut answer = [0; 2];
        connection.read_exact(&mut answer).await.map(|_| answer)
    };
    let ask = async |connection: &mut TcpStream| {
        connection.write_all(b"x").await?;
        answer(connection).await
    };

    let mut old = connect().await;
    assert_eq!(ask(&mut old).await.unwrap(), *b"1x");
    link.all(Flow::Stall);
    let mut new = connect().await;
    assert!(timeout(moment, ask(&mut old)).await.is_err());
    assert!(timeout(moment, ask(&mut new)).await.is_err());
    link.mend();
    // What was sent into the stalled link arrives, and only once.
    for connection in [&mut old, &mut new] {
        assert_eq!(answer(connection).await.unwrap(), *b"1x");
        assert_eq!(ask(connection).await.unwrap(), *b"1x");
    }
    link.fail_over(&second);
    assert!(timeout(moment, ask(&mut old)).await.is_err());
    assert_eq!(ask(&mut connect().await).await.unwrap(), *b"2x");
    until("the closed one is noticed", || async { link.open() == 2 }).await;
    drop(old);
    until("a client that leaves a silent link is noticed", || async { link.open() == 1 }).await;
    link.existing(Flow::Lose);
    assert!(timeout(moment, ask(&mut new)).await.is_err());

    link.unreachable().await;
    assert!(timeout(moment, TcpStream::connect(&address)).await.is_err());
    link.all(Flow::Slow(40));
    let mut slow = connect().await;
    let began = Instant::now();
    for _ in 0..10 {
        assert_eq!(ask(&mut slow).await.unwrap(), *b"2x");
    }
    assert!(began.elapsed() > Duration::from_millis(500));
    let made = link.made();
    link.cut();
    assert!(ask(&mut slow).await.is_err());
    assert!(ask(&mut connect().await).await.is_err());
    assert!(link.made() > made);
    until("all are closed", || async { link.open() == 0 }).await;
}
