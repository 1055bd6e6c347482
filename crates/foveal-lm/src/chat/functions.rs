//! What chat templates expect to find: `tojson` as Python writes JSON, `strftime_now`, `raise_exception`.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};

/// Containers in containers that are written as JSON, at most.
const MAX_DEPTH: usize = 64;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

pub(super) fn add_to(environment: &mut Environment<'_>, clock: fn() -> SystemTime) {
    environment.add_filter("tojson", to_json);
    environment.add_function("strftime_now", move |format: &str| strftime(format, clock()));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
#[allow(clippy::needless_pass_by_value, reason = "the form that filters have")]
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|indent| indent > 64) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson indents by 64 at most"));
    }
    let mut json = Json { text: String::new(), indent };
    json.value(value, 0)?;
    Ok(Value::from_safe_string(json.text))
}

struct Json {
    text: String,
    indent: Option<usize>,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson of too many levels"));
        }
        match value.kind() {
            ValueKind::Map => {
                self.text.push('{');
                let mut any = false;
                for key in value.try_iter()? {
                    self.separate(&mut any, depth + 1);
                    self.value(&Value::from(key.to_string()), depth + 1)?;
                    self.text.push_str(": ");
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close(any, depth, '}');
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.text.push('[');
                let mut any = false;
                for item in value.try_iter()? {
                    self.separate(&mut any, depth + 1);
                    self.value(&item, depth + 1)?;
                }
                self.close(any, depth, ']');
            }
            ValueKind::Undefined => {
                return Err(Error::new(ErrorKind::InvalidOperation, "tojson of what is undefined"));
            }
            _ => {
                let scalar = serde_json::to_string(value)
                    .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
                self.text.push_str(&scalar);
            }
        }
        Ok(())
    }

    fn separate(&mut self, any: &mut bool, depth: usize) {
        match (self.indent, *any) {
            (None, true) => self.text.push_str(", "),
            (Some(_), true) => self.text.push(','),
            _ => {}
        }
        *any = true;
        self.line(depth);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.text.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

/// Python's `strftime` of a time in UTC, for what templates ask of it.
fn strftime(format: &str, time: SystemTime) -> Result<String, Error> {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let weekday = DAYS[(days + 4) as usize % 7];
        let month_name = MONTHS[month - 1];
        // Writing to a string can't fail.
        let _ = match characters.next() {
            Some('Y') => write!(text, "{year}"),
            Some('y') => write!(text, "{:02}", year % 100),
            Some('m') => write!(text, "{month:02}"),
            Some('d') => write!(text, "{day:02}"),
            Some('H') => write!(text, "{:02}", second / 3600),
            Some('M') => write!(text, "{:02}", second / 60 % 60),
            Some('S') => write!(text, "{:02}", second % 60),
            Some('B') => write!(text, "{month_name}"),
            Some('b') => write!(text, "{}", &month_name[..3]),
            Some('A') => write!(text, "{weekday}"),
            Some('a') => write!(text, "{}", &weekday[..3]),
            Some('F') => write!(text, "{year}-{month:02}-{day:02}"),
            Some('%') => write!(text, "%"),
            other => {
                let found = other.map_or_else(String::new, String::from);
                let message = format!("strftime_now does not know %{found}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(text)
}

/// Year, month and day of a number of days since 1970: eras of 400 years that begin in March.
fn civil(days: u64) -> (u64, usize, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(at(0, "%A %d %B %Y, %H:%M:%S"), "Thursday 01 January 1970, 00:00:00");
        assert_eq!(at(951_782_399, "%d %b %Y"), "28 Feb 2000");
        assert_eq!(at(951_782_400, "%F %a %y%%"), "2000-02-29 Tue 00%");
        assert_eq!(at(1_735_689_599, "%F %H:%M:%S"), "2024-12-31 23:59:59");
        assert_eq!(at(4_102_444_800, "%F"), "2100-01-01");
        assert_eq!(at(4_107_542_400, "%F"), "2100-03-01");
    }

    #[test]
    fn what_is_no_format_is_refused() {
        for format in ["%Q", "%", "a%"] {
            let error = strftime(format, UNIX_EPOCH).unwrap_err();
            assert!(error.to_string().contains("strftime_now"), "{error}");
        }
    }

    #[test]
    fn json_is_what_python_writes() {
        let mut environment = Environment::new();
        add_to(&mut environment, SystemTime::now);
        let render = |source: &str| environment.render_str(source, ()).unwrap();
        let value = r#"{"b": [1, 2.5, "é<'\"\n"], "a": {}, "c": none, "d": [true, []]}"#;
        assert_eq!(
            render(&format!("{{{{ {value} | tojson }}}}")),
            r#"{"b": [1, 2.5, "é<'\"\n"], "a": {}, "c": null, "d": [true, []]}"#
        );
        assert_eq!(
            render(r#"{{ {"b": [1, {"x": 2}], "a": []} | tojson(indent=2) }}"#),
            "{\n  \"b\": [\n    1,\n    {\n      \"x\": 2\n    }\n  ],\n  \"a\": []\n}"
        );
    }
}
