//! The date and time that `strftime_now` writes, from a time that was given.

use super::LocalTime;

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
/// Bytes of a format. Each of them becomes at most 24.
const MAX_FORMAT_BYTES: usize = 4096;

impl LocalTime {
    /// 0 for Sunday (Zeller's congruence, in the form of Sakamoto, 1992).
    fn weekday(&self) -> usize {
        const SHIFT: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let month = self.month_index();
        let year = i64::from(self.year) - i64::from(month < 2);
        let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        (year + leaps + SHIFT[month] + i64::from(self.day)).rem_euclid(7) as usize
    }

    /// 1 for the first of January.
    fn day_of_year(&self) -> u32 {
        const BEFORE: [u32; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        let month = self.month_index();
        BEFORE[month] + u32::from(leap && month > 1) + u32::from(self.day)
    }

    fn month_index(&self) -> usize {
        usize::from(self.month.clamp(1, 12)) - 1
    }
}

/// `time.strftime(format)` in the C locale. An unknown directive stays as it is written, as glibc
/// has it. `None` if the format is too long.
pub(super) fn strftime(time: &LocalTime, format: &str) -> Option<String> {
    if format.len() > MAX_FORMAT_BYTES {
        return None;
    }
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(letter) = rest.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut directive = rest.next();
        let bare = directive == Some('-');
        if bare {
            directive = rest.next();
        }
        match directive.and_then(|letter| field(time, letter)) {
            Some(text) if bare => {
                let short = text.trim_start_matches(['0', ' ']);
                out.push_str(if short.is_empty() { "0" } else { short });
            }
            Some(text) => out.push_str(&text),
            None => {
                out.push_str(if bare { "%-" } else { "%" });
                out.extend(directive);
            }
        }
    }
    Some(out)
}

fn field(time: &LocalTime, directive: char) -> Option<String> {
    let month = MONTHS[time.month_index()];
    let day = DAYS[time.weekday()];
    let half = (time.hour + 11) % 12 + 1;
    Some(match directive {
        'Y' => time.year.to_string(),
        'y' => format!("{:02}", time.year.rem_euclid(100)),
        'm' => format!("{:02}", time.month),
        'B' => month.to_owned(),
        'b' | 'h' => month[..3].to_owned(),
        'd' => format!("{:02}", time.day),
        'e' => format!("{:2}", time.day),
        'j' => format!("{:03}", time.day_of_year()),
        'A' => day.to_owned(),
        'a' => day[..3].to_owned(),
        'w' => time.weekday().to_string(),
        'H' => format!("{:02}", time.hour),
        'I' => format!("{half:02}"),
        'M' => format!("{:02}", time.minute),
        'S' => format!("{:02}", time.second),
        'p' => if time.hour < 12 { "AM" } else { "PM" }.to_owned(),
        'F' => strftime(time, "%Y-%m-%d")?,
        'T' => strftime(time, "%H:%M:%S")?,
        'D' => strftime(time, "%m/%d/%y")?,
        'R' => strftime(time, "%H:%M")?,
        '%' => "%".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: &str, expected: &str) {
        let time = LocalTime { year: 2024, month: 7, day: 6, hour: 0, minute: 5, second: 9 };
        assert_eq!(strftime(&time, format).as_deref(), Some(expected));
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        check("%d %b %Y", "06 Jul 2024");
        check("%A, %-d %B %Y", "Saturday, 6 July 2024");
        check("%F %T %I:%M %p day %j", "2024-07-06 00:05:09 12:05 AM day 188");
        check("100%% %Q %", "100% %Q %");
    }
}
