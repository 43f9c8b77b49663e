//! CPU and heap profiles in pprof's format.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::Query;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use pprof::protos::Message as _;
use tokio::sync::Mutex;

/// One profile at a time: the sampler is the process's.
static PROFILING: Mutex<()> = Mutex::const_new(());

const MAX_SECONDS: u64 = 120;
const MAX_FREQUENCY: i32 = 1000;

/// Samples for `seconds` (10) at `frequency` (99 Hz).
pub(super) async fn profile(Query(query): Query<BTreeMap<String, String>>) -> Response {
    let number = |name: &str, default: u64| query.get(name).map_or(Ok(default), |text| text.parse::<u64>());
    let (Ok(seconds), Ok(frequency)) = (number("seconds", 10), number("frequency", 99)) else {
        return bad("seconds and frequency are numbers");
    };
    let Some(frequency) = i32::try_from(frequency).ok().filter(|f| (1..=MAX_FREQUENCY).contains(f)) else {
        return bad("frequency is 1 to 1000");
    };
    if !(1..=MAX_SECONDS).contains(&seconds) {
        return bad("seconds is 1 to 120");
    }
    let Ok(_one) = PROFILING.try_lock() else {
        return (StatusCode::CONFLICT, "a profile is being taken already\n").into_response();
    };
    match sample(Duration::from_secs(seconds), frequency).await {
        Ok(bytes) => octets(bytes, "profile.pb"),
        Err(error) => failed(&format!("cannot take a CPU profile: {error}")),
    }
}

async fn sample(time: Duration, frequency: i32) -> anyhow::Result<Vec<u8>> {
    let guard = pprof::ProfilerGuardBuilder::default()
        .frequency(frequency)
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    tokio::time::sleep(time).await;
    Ok(guard.report().build()?.pprof()?.encode_to_vec())
}

/// What is allocated now, where the allocator profiles: `MALLOC_CONF=prof:true` at start.
pub(super) async fn heap() -> Response {
    let Some(control) = jemalloc_pprof::PROF_CTL.as_ref() else {
        return (
            StatusCode::NOT_IMPLEMENTED,
            "heap profiles are off: start the proxy with MALLOC_CONF=prof:true,prof_active:true,lg_prof_sample:19\n",
        )
            .into_response();
    };
    let mut control = control.lock().await;
    if !control.activated() {
        return (
            StatusCode::CONFLICT,
            "heap profiling is not active: start with MALLOC_CONF=prof:true,prof_active:true\n",
        )
            .into_response();
    }
    match control.dump_pprof() {
        Ok(bytes) => octets(bytes, "heap.pb.gz"),
        Err(error) => failed(&format!("cannot take a heap profile: {error}")),
    }
}

fn octets(bytes: Vec<u8>, name: &str) -> Response {
    let disposition = format!("attachment; filename=\"{name}\"");
    ([(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_DISPOSITION, disposition)], bytes)
        .into_response()
}

fn bad(reason: &'static str) -> Response {
    (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response()
}

fn failed(reason: &str) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n")).into_response()
}
