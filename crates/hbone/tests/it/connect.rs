//! CONNECT and its answers.

use h2::client;
use http::{Method, Request as HttpRequest, StatusCode, Version};
use tokio::task::spawn_local;
use zspire_hbone::headers::{Baggage, Headers};
use zspire_hbone::{Config, Malformed, OpenError, Reason, Request, ResponseHead, Target};

use crate::support::{
    DATA, END_HEADERS, HEADERS, Peer, RST_STREAM, SETTINGS, Server, block, connect_block, frame, hello, open, pair,
    request, run, run_paused, settle, until, wire,
};

fn headers() -> Headers {
    let mut baggage = Baggage::default();
    baggage.merge("k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,service.version=v3").unwrap();
    Headers {
        baggage: Some(baggage),
        forwarded: Some("for=\"[fd00::7]:4711\"".parse().unwrap()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap()),
        network: Some("network-1".into()),
    }
}

#[test]
fn the_handler_sees_the_request_and_the_client_the_answer() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        for target in ["10.0.0.1:80", "[fd00::1]:8080", "cart.shop.svc.cluster.local:80"] {
            let request = Request { target: target.parse().unwrap(), headers: headers() };
            let mut answer = ResponseHead::default();
            answer.baggage.get_or_insert_default().merge("k8s.namespace.name=there").unwrap();
            let (opened, head) = tokio::join!(client.tunnel.open(&request), async {
                let incoming = server.next().await;
                let head = incoming.head.clone();
                (incoming.accept(&answer).unwrap(), head)
            });
            let (_stream, response) = opened.unwrap();
            assert_eq!(response, answer);
            assert_eq!(head.1.target, request.target);
            assert_eq!(head.1.headers, request.headers);
            assert_eq!(head.1.address().is_some(), matches!(request.target, Target::Address(_)));
        }
        assert!(server.malformed.borrow().is_empty());
    });
}

#[test]
fn success_is_said_only_when_the_handler_accepts() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let tunnel = client.tunnel.clone();
        let opening = spawn_local(async move { tunnel.open(&request("10.0.0.1:80")).await });
        let incoming = server.next().await;
        settle().await;
        assert!(!opening.is_finished(), "the destination is not connected yet");
        let _stream = incoming.accept(&ResponseHead::default()).unwrap();
        opening.await.unwrap().unwrap();
    });
}

#[test]
fn a_refusal_reaches_the_client_with_its_status() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        for status in [StatusCode::BAD_REQUEST, StatusCode::UNAUTHORIZED, StatusCode::SERVICE_UNAVAILABLE] {
            let request = request("10.0.0.1:80");
            let (opened, ()) = tokio::join!(client.tunnel.open(&request), async { server.next().await.reject(status) });
            let error = opened.unwrap_err();
            assert!(matches!(error, OpenError::Refused(got) if got == status), "{error}");
            assert!(!error.unprocessed(), "an answer is final");
        }
        assert_eq!(client.tunnel.streams(), 0);
        // The tunnel is as good as before.
        open(&client, &mut server).await;
    });
}

#[test]
fn a_request_that_the_handler_forgets_is_refused() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let request = request("10.0.0.1:80");
        let (opened, ()) = tokio::join!(client.tunnel.open(&request), async { drop(server.next().await) });
        assert!(matches!(opened.unwrap_err(), OpenError::Refused(StatusCode::SERVICE_UNAVAILABLE)));
    });
}

/// What a foreign client sends, and what the server calls it.
async fn foreign(request: HttpRequest<()>) -> (StatusCode, Vec<Malformed>) {
    let (near, far) = wire();
    let mut server = Server::new(far, &Config::default());
    let (mut send, connection) = client::handshake(near).await.unwrap();
    let connection = spawn_local(connection);
    let (response, body) = send.send_request(request, true).unwrap();
    let status = response.await.unwrap().status();
    assert!(server.asked.try_recv().is_err(), "no handler sees it");
    drop((send, body));
    connection.await.unwrap().unwrap();
    let malformed = server.malformed.borrow().clone();
    (status, malformed)
}

fn http(method: Method, uri: &str) -> HttpRequest<()> {
    HttpRequest::builder().method(method).uri(uri).version(Version::HTTP_2).body(()).unwrap()
}

#[test]
fn what_is_not_hbone_is_answered_with_400() {
    run(async {
        let cases = [
            (http(Method::GET, "http://10.0.0.1/"), Malformed::Method),
            (http(Method::POST, "https://svc.ns:15008/x"), Malformed::Method),
            (http(Method::CONNECT, "svc.ns"), Malformed::Authority),
            (http(Method::CONNECT, "10.0.0.1"), Malformed::Authority),
            (http(Method::CONNECT, "127.1:80"), Malformed::Authority),
            (http(Method::CONNECT, "user@host:80"), Malformed::Authority),
        ];
        for (request, malformed) in cases {
            let shown = format!("{request:?}");
            assert_eq!(foreign(request).await, (StatusCode::BAD_REQUEST, vec![malformed]), "{shown}");
        }
    });
}

#[test]
fn connect_without_authority_reaches_no_handler() {
    run(async {
        let (near, far) = wire();
        let mut server = Server::new(far, &Config::default());
        let mut peer = Peer::new(near);
        let mut bytes = hello();
        bytes.extend(frame(HEADERS, END_HEADERS, 1, &block(&[(":method", "CONNECT")])));
        peer.send(&bytes).await;
        // An answer to the stream, or its reset.
        peer.next(|frame| frame.stream == 1).await.unwrap();
        assert!(server.asked.try_recv().is_err());
        assert!(!server.task.is_finished(), "one bad stream does not end the tunnel");
    });
}

#[test]
fn the_clients_limit_of_streams() {
    run(async {
        let (client, mut server) = pair(&Config { client_streams: 2, ..Config::default() }, &Config::default()).await;
        assert_eq!(client.tunnel.free(), 1, "one until the peer has said how many it takes");
        let first = open(&client, &mut server).await;
        let _second = open(&client, &mut server).await;
        assert_eq!((client.tunnel.streams(), client.tunnel.free()), (2, 0));
        let error = client.tunnel.open(&request("10.0.0.1:80")).await.unwrap_err();
        assert!(matches!(error, OpenError::Full) && error.unprocessed());
        drop(first);
        assert_eq!(client.tunnel.free(), 1);
        open(&client, &mut server).await;
    });
}

#[test]
fn the_servers_limit_of_streams_is_kept_by_the_client() {
    run(async {
        let theirs = Config { server_streams: 3, ..Config::default() };
        let (client, mut server) = pair(&Config::default(), &theirs).await;
        let mut streams = vec![open(&client, &mut server).await];
        until("settings", || client.tunnel.free() == 2).await;
        streams.push(open(&client, &mut server).await);
        streams.push(open(&client, &mut server).await);
        assert!(matches!(client.tunnel.open(&request("10.0.0.1:80")).await, Err(OpenError::Full)));
    });
}

#[test]
fn the_servers_limit_of_streams_is_enforced() {
    run(async {
        let (near, far) = wire();
        let mut server = Server::new(far, &Config { server_streams: 2, ..Config::default() });
        let mut peer = Peer::new(near);
        let mut bytes = hello();
        for stream in [1, 3, 5] {
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &connect_block()));
        }
        peer.send(&bytes).await;
        let reset = peer.next(|frame| frame.kind == RST_STREAM).await.unwrap();
        assert_eq!((reset.stream, reset.code()), (5, u32::from(Reason::REFUSED_STREAM)));
        let _kept = [server.accept().await, server.accept().await];
        assert!(server.asked.try_recv().is_err());
    });
}

#[test]
fn a_connect_that_is_given_up_is_noticed_while_the_handler_connects() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let tunnel = client.tunnel.clone();
        let opening = spawn_local(async move { tunnel.open(&request("10.0.0.1:80")).await.map(|_| ()) });
        let mut incoming = server.next().await;
        settle().await;
        let abandoned = incoming.abandoned();
        tokio::pin!(abandoned);
        assert!(futures_pending(abandoned.as_mut()).await, "the client still waits");
        opening.abort();
        abandoned.await;
        assert_eq!(client.tunnel.streams(), 0);
        open(&client, &mut server).await;
    });
}

#[test]
fn a_connect_of_a_tunnel_that_breaks_is_noticed_while_the_handler_connects() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let tunnel = client.tunnel.clone();
        let opening = spawn_local(async move { tunnel.open(&request("10.0.0.1:80")).await.map(|_| ()) });
        let mut incoming = server.next().await;
        client.task.abort();
        incoming.abandoned().await;
        assert!(opening.await.unwrap().is_err());
    });
}

/// Whether a future has to wait, asked once after everything else has run.
async fn futures_pending<F: Future + Unpin>(mut future: F) -> bool {
    settle().await;
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut future).poll(cx).is_pending())).await
}

#[test]
fn an_answer_that_does_not_come_is_not_waited_for() {
    run_paused(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let started = tokio::time::Instant::now();
        let request = request("10.0.0.1:80");
        let (opened, incoming) = tokio::join!(client.tunnel.open(&request), server.next());
        assert!(matches!(opened.unwrap_err(), OpenError::TimedOut));
        assert_eq!(started.elapsed().as_secs(), Config::default().reply_timeout.as_secs());
        let mut incoming = incoming;
        incoming.abandoned().await;
        open(&client, &mut server).await;
    });
}

#[test]
fn a_tunnel_in_a_tunnel() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    run(async {
        let config = Config::default();
        let (client, mut server) = pair(&config, &config).await;
        let (ours, theirs) = open(&client, &mut server).await;
        let mut inner_server = Server::new(theirs.into_io(), &config);
        let inner = crate::support::client(ours.into_io(), &config).await;
        let (near, far) = open(&inner, &mut inner_server).await;
        let (mut near, mut far) = (near.into_io(), far.into_io());
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 253) as u8).collect();
        let mut received = Vec::new();
        let (_, read) = tokio::join!(
            async {
                near.write_all(&sent).await.unwrap();
                near.shutdown().await.unwrap();
            },
            far.read_to_end(&mut received)
        );
        read.unwrap();
        assert!(received == sent);
    });
}

/// What comes beside a refusal reaches nobody, and does not cost the tunnel its window.
#[test]
fn data_of_a_refusal_is_nobodys() {
    run(async {
        let (near, far) = wire();
        let config =
            Config { stream_window: 100_000, connection_window: 100_000, buffered_cap: 0, ..Config::default() };
        let client = crate::support::client(near, &config).await;
        let mut peer = Peer::server(far);
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        for stream in (1..40).step_by(2) {
            let refusal = block(&[(":status", "403")]);
            let mut bytes = frame(HEADERS, END_HEADERS, stream, &refusal);
            bytes.extend(frame(DATA, 0, stream, &[7; 50_000]));
            let request = request("10.0.0.1:80");
            let (opened, ()) = tokio::join!(client.tunnel.open(&request), peer.send(&bytes));
            assert!(matches!(opened, Err(OpenError::Refused(StatusCode::FORBIDDEN))), "{opened:?}");
            let reset = peer.next(|frame| frame.kind == RST_STREAM).await.expect("it is told to stop");
            assert_eq!((reset.stream, reset.code()), (stream, u32::from(Reason::CANCEL)));
        }
        assert!(!client.task.is_finished());
    });
}
