//! Which domains a policy means. Pure: the domains of this host are an argument.

use super::Policy;
use crate::error::{Error, Kind};
use crate::name::{DomainName, DomainUuid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// How a policy names domains: a name, a pattern with `*` and `?`, a UUID, or a tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    /// The domain of exactly this name.
    Name(String),
    /// Domains whose whole name matches: `*` is any run of characters, `?` is one.
    Pattern(String),
    /// The domain of this UUID, whatever its name.
    Uuid(DomainUuid),
    /// `tag:gold`: a word in the domain's metadata.
    Tag(String),
}

/// What a selector by tag begins with.
const TAG: &str = "tag:";

impl TryFrom<String> for Selector {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        if let Ok(uuid) = DomainUuid::new(text.to_ascii_lowercase()) {
            return Ok(Selector::Uuid(uuid));
        }
        if let Some(tag) = text.strip_prefix(TAG) {
            return match tag.is_empty() || tag.contains(|c: char| c.is_whitespace() || matches!(c, ',' | '*' | '?')) {
                true => Err(Error::new(Kind::Config, format!("'{tag}' is no tag: it is one word, without * and ?"))),
                false => Ok(Selector::Tag(tag.to_owned())),
            };
        }
        let plain = text.replace(['*', '?'], "x");
        DomainName::new(plain).map_err(|e| Error::new(Kind::Config, e.what().to_owned()))?;
        match text.contains(['*', '?']) {
            true => Ok(Selector::Pattern(text)),
            false => Ok(Selector::Name(text)),
        }
    }
}

impl From<Selector> for String {
    fn from(s: Selector) -> String {
        s.to_string()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Name(text) | Selector::Pattern(text) => f.write_str(text),
            Selector::Uuid(uuid) => uuid.fmt(f),
            Selector::Tag(tag) => write!(f, "{TAG}{tag}"),
        }
    }
}

impl Selector {
    /// True if the selector selects this domain.
    pub fn means(&self, domain: &SeenDomain) -> bool {
        match self {
            Selector::Name(name) => name == domain.name.as_str(),
            Selector::Pattern(pattern) => glob(pattern, domain.name.as_str()),
            Selector::Uuid(uuid) => *uuid == domain.uuid,
            Selector::Tag(tag) => domain.tags.contains(tag),
        }
    }
}

/// Whether `pattern` is all of `text`; `*` is any run of characters, `?` is one. Takes at most their lengths
/// multiplied.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where the last star stood, and what it had swallowed: on a mismatch it swallows one more.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((at, swallowed)) => {
                    (p, t) = (at + 1, swallowed + 1);
                    star = Some((at, swallowed + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// A domain of this host, as far as policies ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenDomain {
    /// Name of the domain, which names and patterns of a policy are compared with.
    pub name: DomainName,
    /// UUID of the domain, which stays if the domain is renamed.
    pub uuid: DomainUuid,
    /// Words in its metadata.
    pub tags: Vec<String>,
}

/// A domain that a policy sends to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Index of the policy.
    pub policy: usize,
    /// Domain that the policy selects.
    pub domain: SeenDomain,
    /// The target's name in the configuration.
    pub target: String,
}

/// Which domain goes to which target, and what is wrong with that.
#[derive(Debug, Default)]
pub struct Selection {
    /// Each (domain, target) once.
    pub pairs: Vec<Pair>,
    /// Domains that two policies mean for one target. The policy that comes first keeps them, so that they do not go
    /// without a replica until somebody has read this.
    pub clashes: Vec<Error>,
    /// Names and UUIDs (index of the policy) that are no domain of this host. A pattern or a tag may mean nobody.
    pub unmatched: Vec<(usize, Selector)>,
}

/// A replica of a store on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenReplica {
    /// The domain it is of; a source's tags do not travel.
    pub domain: SeenDomain,
    /// Directory of the store that has the replica.
    pub store: PathBuf,
}

/// How a store on this host is written as a target.
pub fn store_url(store: &Path) -> String {
    format!("local:{}", store.display())
}

/// Who goes where. `urls`: the target's URL by its name; two names of one URL are one target. Policies of a target:
/// which replicas they mean.
pub fn select(
    policies: &[Policy],
    domains: &[SeenDomain],
    replicas: &[SeenReplica],
    urls: &BTreeMap<String, String>,
) -> Selection {
    let mut found = Selection::default();
    let mut taken: BTreeMap<(DomainUuid, String), usize> = BTreeMap::new();
    for (at, policy) in policies.iter().enumerate() {
        let known: Vec<&SeenDomain> = match &policy.store {
            None => domains.iter().collect(),
            Some(store) => replicas.iter().filter(|r| r.store == *store).map(|r| &r.domain).collect(),
        };
        let targets = policy.store.as_ref().map_or_else(|| policy.targets.clone(), |store| vec![store_url(store)]);
        let named = policy.domains.iter().filter(|s| matches!(s, Selector::Name(_) | Selector::Uuid(_)));
        let missing = named.filter(|s| !known.iter().any(|d| s.means(d)));
        found.unmatched.extend(missing.map(|s| (at, s.clone())));
        for domain in known.into_iter().filter(|d| policy.means(d)) {
            for target in &targets {
                let key = (domain.uuid.clone(), urls.get(target).unwrap_or(target).clone());
                match taken.get(&key) {
                    Some(&first) => found.clashes.push(clash(&policies[first], policy, domain, target)),
                    None => {
                        taken.insert(key, at);
                        found.pairs.push(Pair { policy: at, domain: domain.clone(), target: target.clone() });
                    }
                }
            }
        }
    }
    found
}

fn clash(first: &Policy, second: &Policy, domain: &SeenDomain, target: &str) -> Error {
    let what = match first.name == second.name {
        true => format!(
            "policy '{}' sends domain '{}' twice to target '{target}': two of its targets have one URL",
            first.name, domain.name
        ),
        false => format!(
            "domain '{}' is sent to target '{target}' by two policies: '{}' ({}) and '{}' ({})",
            domain.name,
            first.name,
            first.file.display(),
            second.name,
            second.file.display()
        ),
    };
    Error::new(Kind::Config, what)
        .hint(format!("exclude it in one of them; until then '{}' is the one that is obeyed", first.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(n: usize) -> DomainUuid {
        DomainUuid::new(format!("00000000-0000-0000-0000-{n:012x}")).unwrap()
    }

    fn domains(names: &str) -> Vec<SeenDomain> {
        let names = names.split_whitespace().enumerate();
        names
            .map(|(n, name)| SeenDomain { name: DomainName::new(name).unwrap(), uuid: uuid(n), tags: Vec::new() })
            .collect()
    }

    fn policy(name: &str, lines: &str) -> Policy {
        let text = format!("name: {name}\nevery: 5m\n{lines}");
        Policy::parse(&text, Path::new(&format!("{name}.yaml")), &["x", "y", "z"]).unwrap()
    }

    fn urls() -> BTreeMap<String, String> {
        [("x", "ssh://one"), ("y", "ssh://two"), ("z", "ssh://one")].map(|(n, u)| (n.into(), u.into())).into()
    }

    fn pairs(s: &Selection) -> Vec<String> {
        s.pairs.iter().map(|p| format!("{}:{}>{}", p.policy, p.domain.name, p.target)).collect()
    }

    #[test]
    fn patterns_are_the_shell_s_simplest() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("*", "web01", true),
            ("web*", "web", true),
            ("web?", "web", false),
            ("w*b*1", "web01", true),
            ("*-test", "a-test-test", true),
            ("a*b*c", "aXbYbZ", false),
            ("ä?ü", "äöü", true),
            ("web[01]*", "web01", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
        // Does not blow up.
        assert!(!glob(&"*a".repeat(40), &"a".repeat(200).replace("aaaa", "aaab")));
    }

    #[test]
    fn names_patterns_and_uuids_mean_and_exclusions_do_not() {
        let all = domains("web01 web02 web-test db01");
        let text = format!("domains: [web*, {}]\nexclude: [\"*-test\"]\ntargets: [x, y]\n", uuid(3));
        let s = select(&[policy("p", &text)], &all, &[], &urls());
        assert_eq!(pairs(&s), ["0:web01>x", "0:web01>y", "0:web02>x", "0:web02>y", "0:db01>x", "0:db01>y"]);
        assert!(s.clashes.is_empty() && s.unmatched.is_empty());
    }

    #[test]
    fn a_domain_of_two_policies_is_said_with_both_files_and_kept_by_the_first() {
        let a = policy("a", "domains: [web01]\ntargets: [x]\n");
        let b = policy("b", "domains: [web*, nobody]\ntargets: [z, y]\n");
        let s = select(&[a, b], &domains("web01 web02"), &[], &urls());
        assert_eq!(pairs(&s), ["0:web01>x", "1:web01>y", "1:web02>z", "1:web02>y"]);
        let [e] = s.clashes.as_slice() else { panic!("{:?}", s.clashes) };
        let text = e.to_string();
        assert!(text.contains("'web01'") && text.contains("a.yaml") && text.contains("b.yaml"), "{text}");
        assert_eq!(s.unmatched, [(1, Selector::Name("nobody".into()))]);
    }

    #[test]
    fn tags_mean_whoever_bears_them() {
        let mut all = domains("web01 db01 gold");
        all[1].tags = vec!["gold".to_owned(), "x".to_owned()];
        let s = select(&[policy("p", "domains: [\"tag:gold\"]\ntargets: [x]\n")], &all, &[], &urls());
        assert_eq!(pairs(&s), ["0:db01>x"], "a tag is no name");
        let s = select(&[policy("p", "domains: [\"*\"]\nexclude: [\"tag:x\"]\ntargets: [x]\n")], &all, &[], &urls());
        assert_eq!(pairs(&s), ["0:web01>x", "0:gold>x"]);
        let none = select(&[policy("p", "domains: [\"tag:none\"]\ntargets: [x]\n")], &all, &[], &urls());
        assert!(none.unmatched.is_empty(), "nobody has to bear a tag");
        for wrong in ["tag:", "tag:a b", "tag:a*"] {
            assert!(Selector::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_policy_of_a_target_means_the_replicas_of_its_store() {
        let text = "name: t\nreplicas: [\"web*\"]\nexclude: [web02]\nroot: /srv/a\nscrub: {every: 1d}\n";
        let policy = Policy::parse(text, Path::new("t.yaml"), &[]).unwrap();
        let all = domains("web01 web02 web03");
        let replica = |n: usize, store: &str| SeenReplica { domain: all[n].clone(), store: store.into() };
        let replicas = [replica(0, "/srv/a"), replica(1, "/srv/a"), replica(2, "/srv/b")];
        let s = select(&[policy], &all, &replicas, &urls());
        assert_eq!(pairs(&s), ["0:web01>local:/srv/a"]);
    }
}
