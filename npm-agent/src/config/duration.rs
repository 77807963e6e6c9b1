//! Durations as operators write them: a whole number and a unit.

use std::time::Duration;

use super::value::ValueError;

/// The units, with their length in milliseconds. `ms` stands before `m` and `s`, which end it too.
const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

/// Reads `500ms`, `30s`, `5m`, `1h`. There is no default unit and no sum of several.
///
/// # Errors
/// The text is nothing of that kind, or too large for 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    let invalid = || ValueError::Duration { text: text.to_owned() };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(invalid)?;
    let number = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    Ok(Duration::from_millis(number.ok_or_else(invalid)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_number_with_a_unit_and_nothing_else() {
        for (text, millis) in [("0s", 0), ("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in [
            "",
            "30",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "1S",
            "1m30s",
            "1d",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
