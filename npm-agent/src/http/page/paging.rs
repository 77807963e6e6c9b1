//! The query of a page, and lists in parts.

use form_urlencoded::Serializer;
use maud::{Markup, html};

use super::{Page, words};

/// How many rows a list shows at once.
pub(super) const PER_PAGE: usize = 50;

/// How many bytes of a field are read: two names of Kubernetes with a slash between them have fewer.
const MAX_FIELD_BYTES: usize = 640;

/// What a page was asked for; fields that no page knows are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(in crate::http) struct Query {
    /// Text that rows are to contain.
    pub(super) filter: String,
    /// Which rows: a word of the page's own.
    pub(super) show: String,
    /// The part of a list, from 1.
    pub(super) page: usize,
    /// What a page of one object is about.
    pub(super) name: String,
    /// Who opens a connection.
    pub(super) from: String,
    /// Whom to.
    pub(super) to: String,
    /// By which protocol.
    pub(super) protocol: String,
    /// To which port.
    pub(super) port: String,
}

impl Query {
    /// Reads what is behind the `?`. What can't be read counts as not given.
    pub(in crate::http) fn parse(text: &str) -> Self {
        let mut query = Self { page: 1, ..Self::default() };
        for (key, value) in form_urlencoded::parse(text.as_bytes()) {
            let value = words::cut(value.trim(), MAX_FIELD_BYTES).to_owned();
            match &*key {
                "filter" => query.filter = value,
                "show" => query.show = value,
                "page" => query.page = value.parse().unwrap_or(1).max(1),
                "name" => query.name = value,
                "from" => query.from = value,
                "to" => query.to = value,
                "protocol" => query.protocol = value,
                "port" => query.port = value,
                _ => {}
            }
        }
        query
    }

    /// Whether a row with this text is asked for.
    pub(super) fn admits(&self, text: &str) -> bool {
        self.filter.is_empty() || text.contains(&self.filter)
    }
}

/// The address of a page with these fields.
pub(super) fn link(page: Page, fields: &[(&str, &str)]) -> String {
    let mut query = Serializer::new(String::new());
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
        query.append_pair(key, value);
    }
    match query.finish() {
        query if query.is_empty() => page.path().to_owned(),
        query => format!("{}?{query}", page.path()),
    }
}

/// One part of a list.
pub(super) struct Part<T> {
    rows: Vec<T>,
    /// How many are before it.
    before: usize,
    /// How many there are in all.
    total: usize,
    page: usize,
}

impl<T> Part<T> {
    /// The part that `query` asks for; the last one, if there are not so many.
    pub(super) fn of(query: &Query, all: impl IntoIterator<Item = T>) -> Self {
        let mut part = Self { rows: Vec::new(), before: 0, total: 0, page: 1 };
        for row in all {
            let page = part.total / PER_PAGE + 1;
            if page <= query.page {
                if page > part.page {
                    part = Self { rows: Vec::new(), before: part.total, page, ..part };
                }
                part.rows.push(row);
            }
            part.total += 1;
        }
        part
    }

    pub(super) fn rows(&self) -> &[T] {
        &self.rows
    }

    /// Which part this is, and the ways to its neighbours.
    pub(super) fn navigation(&self, of: Page, query: &Query) -> Markup {
        let to = |page: usize| {
            let page = page.to_string();
            link(
                of,
                &[("name", &query.name), ("filter", &query.filter), ("show", &query.show), ("page", &page)],
            )
        };
        let last = self.before + self.rows.len();
        html! {
            p.paging {
                @if self.page > 1 { a rel="prev" href=(to(self.page - 1)) { "‹ previous" } }
                @if self.total == 0 { span { "nothing" } }
                @else if self.total <= PER_PAGE { span { (words::count(self.total)) " in all" } }
                @else { span { (words::count(self.before + 1)) " to " (words::count(last)) " of " (words::count(self.total)) } }
                @if last < self.total { a rel="next" href=(to(self.page + 1)) { "next ›" } }
            }
        }
    }
}

/// The field that filters a list, beside what the list already shows.
pub(super) fn filter(of: Page, query: &Query, label: &str) -> Markup {
    html! {
        form.filter method="get" action=(of.path()) {
            @if !query.name.is_empty() { input type="hidden" name="name" value=(query.name); }
            @if !query.show.is_empty() { input type="hidden" name="show" value=(query.show); }
            label { span { (label) } input type="search" name="filter" value=(query.filter) autocomplete="off"; }
            button type="submit" { "Filter" }
            @if !query.filter.is_empty() {
                a href=(link(of, &[("name", &query.name), ("show", &query.show)])) { "show all" }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_whatever_it_is() {
        let query =
            Query::parse("from=x%2Fa&to=+10.0.0.1+&protocol=TCP&port=80&page=x&nonsense=%ff%00&filter");
        assert_eq!((query.from.as_str(), query.to.as_str(), query.port.as_str()), ("x/a", "10.0.0.1", "80"));
        assert_eq!((query.page, query.filter.as_str()), (1, ""));
        assert_eq!(Query::parse("page=0").page, 1);
        assert_eq!(Query::parse(&format!("filter={}", "é".repeat(9000))).filter.len(), MAX_FIELD_BYTES);
        assert_eq!(Query::parse("&&=&%"), Query { page: 1, ..Query::default() });
    }

    #[test]
    fn a_list_comes_in_parts() {
        let part = |page| Part::of(&Query { page, ..Query::default() }, 0..PER_PAGE * 2 + 1);
        assert_eq!(part(1).rows(), (0..PER_PAGE).collect::<Vec<_>>());
        assert_eq!(part(3).rows(), [PER_PAGE * 2]);
        assert_eq!(part(usize::MAX).rows(), [PER_PAGE * 2], "the last one");
        let text =
            part(2).navigation(Page::Sets, &Query { filter: "a&b".into(), ..Query::default() }).into_string();
        assert!(text.contains("51 to 100 of 101"), "{text}");
        assert!(text.contains(r#"href="/sets?filter=a%26b&amp;page=3""#), "{text}");
        let none = Part::of(&Query::parse("page=7"), std::iter::empty::<()>());
        assert!(none.navigation(Page::Sets, &Query::default()).into_string().contains("nothing"));
    }
}
