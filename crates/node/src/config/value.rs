//! How single values are written: texts, flags, numbers, ports, durations, worker counts.

use std::str::FromStr;
use std::time::Duration;

use super::Error;
use super::options::{self as opt, Values, Variable};

pub(super) fn error(variable: &Variable, value: &str, reason: &str) -> Error {
    Error::Value { variable: variable.name, value: value.to_owned(), reason: reason.to_owned() }
}

pub(super) fn text(v: &Values, variable: &Variable, default: &str) -> String {
    v.get(variable).unwrap_or(default).to_owned()
}

pub(super) fn parsed<T: FromStr>(v: &Values, variable: &Variable, expected: &str) -> Result<Option<T>, Error> {
    let Some(text) = v.get(variable) else { return Ok(None) };
    match text.trim().parse() {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(error(variable, text, &format!("expected {expected}"))),
    }
}

pub(super) fn flag(v: &Values, variable: &Variable, default: bool) -> Result<bool, Error> {
    match v.get(variable).map(str::to_ascii_lowercase).as_deref() {
        None => Ok(default),
        Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(error(variable, other, "expected true or false")),
    }
}

pub(super) fn port(v: &Values, variable: &Variable, default: u16) -> Result<u16, Error> {
    Ok(parsed(v, variable, "a port, 0 to 65535")?.unwrap_or(default))
}

pub(super) fn duration(v: &Values, variable: &Variable, default: Duration) -> Result<Duration, Error> {
    let Some(text) = v.get(variable) else { return Ok(default) };
    parse_duration(text).ok_or_else(|| error(variable, text, "expected a duration such as 250ms, 30s, 5m or 1h30m"))
}

/// Numbers with units, added up: `1h30m`.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|end| *end > 0)?;
        let number: u64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| n + digits);
        let milliseconds: u64 = match rest[digits..unit_end].trim() {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(number.checked_mul(milliseconds)?))?;
        rest = rest[unit_end..].trim_start();
    }
    Some(total)
}

/// Data-plane threads: what is set, else the CPU limit, else a share of the machine.
pub(super) fn workers(v: &Values, concurrency: Option<u32>) -> Result<usize, Error> {
    let machine = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Not a limit in spite of its name: Kubernetes puts the machine's cores there where the pod has none.
    let cores = quantity(v, &opt::ZTUNNEL_CPU_LIMIT)?.map_or(machine, |cores| cores.clamp(1, machine));
    let variable = &opt::ZTUNNEL_WORKER_THREADS;
    if let Some(text) = v.get(variable) {
        let expected = "expected a number, a percentage such as 50%, or 0 for every core";
        return match text.strip_suffix('%') {
            Some(share) => {
                let share: f64 = share.parse().map_err(|_| error(variable, text, expected))?;
                if !(share > 0.0 && share <= 100.0) {
                    return Err(error(variable, text, "expected a percentage above 0 and up to 100"));
                }
                Ok(((cores as f64 * share / 100.0).ceil() as usize).max(1))
            }
            None => match text.parse::<usize>() {
                Ok(0) => Ok(cores),
                Ok(n) if n <= 1024 => Ok(n),
                _ => Err(error(variable, text, expected)),
            },
        };
    }
    if let Some(set) = concurrency {
        return Ok(if set == 0 { cores } else { (set as usize).min(1024) });
    }
    if let Some(limit) = quantity(v, &opt::ZTUNNEL_RESOURCE_CPU_LIMIT)? {
        return Ok(limit.clamp(1, cores));
    }
    let request = quantity(v, &opt::ZTUNNEL_RESOURCE_CPU_REQUEST)?.unwrap_or(0);
    Ok(cores.div_ceil(4).max(request).clamp(2.min(cores), cores))
}

/// Cores, rounded up: `2`, `0.5`, `1500m`.
fn quantity(v: &Values, variable: &Variable) -> Result<Option<usize>, Error> {
    let Some(text) = v.get(variable) else { return Ok(None) };
    let parsed = match text.strip_suffix('m') {
        Some(milli) => milli.parse::<f64>().map(|m| m / 1000.0),
        None => text.parse::<f64>(),
    };
    match parsed {
        Ok(cores) if (0.0..1e6).contains(&cores) => Ok(Some(cores.ceil() as usize)),
        _ => Err(error(variable, text, "expected a number of cores such as 2, 0.5 or 1500m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units() {
        let cases = [
            ("250ms", Some(250)),
            ("30s", Some(30_000)),
            ("1h30m", Some(5_400_000)),
            ("24h", Some(86_400_000)),
            ("1d 2h", Some(93_600_000)),
            ("", None),
            ("5", None),
            ("s", None),
            ("5 years", None),
            ("-5s", None),
            ("99999999999999999999s", None),
            ("18446744073709551615d", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_duration(text), expected.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn workers_follow_setting_then_limit_then_machine() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let of = |pairs: &[(&str, &str)], concurrency| {
            workers(&Values::from_pairs(pairs.iter().copied()), concurrency).map_err(|e| e.to_string())
        };
        assert_eq!(of(&[("ZTUNNEL_WORKER_THREADS", "3")], None), Ok(3));
        assert_eq!(of(&[("ZTUNNEL_WORKER_THREADS", "0")], None), Ok(cores));
        assert_eq!(of(&[("ZTUNNEL_WORKER_THREADS", "100%")], None), Ok(cores));
        assert_eq!(of(&[("ZTUNNEL_WORKER_THREADS", "1%")], None), Ok(1));
        assert_eq!(of(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "500m")], None), Ok(1));
        assert_eq!(of(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "1")], Some(7)), Ok(7));
        // As Kubernetes sets it for a pod without a limit: nothing but how many cores there are.
        assert_eq!(of(&[("ZTUNNEL_CPU_LIMIT", "100000")], None), of(&[], None));
        assert_eq!(of(&[("ZTUNNEL_CPU_LIMIT", "1"), ("ZTUNNEL_WORKER_THREADS", "0")], None), Ok(1));
        assert_eq!(of(&[("ZTUNNEL_CPU_LIMIT", "1"), ("ZTUNNEL_RESOURCE_CPU_LIMIT", "4")], None), Ok(1));
        assert!(of(&[("ZTUNNEL_WORKER_THREADS", "101%")], None).is_err());
        assert!(of(&[("ZTUNNEL_WORKER_THREADS", "many")], None).is_err());
    }
}
