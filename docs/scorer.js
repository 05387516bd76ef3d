// What a search finds first: an object that bears the name, of those in the package itself before those in its parts;
// modules last. The other numbers are Sphinx's own.
var Scorer = {
  score: ([, title, , description, score, , kind]) => {
    if (kind !== "object") return score;
    const asked = new URLSearchParams(location.search).get("q").trim().toLowerCase();
    const names = title.toLowerCase().split(".");
    if (description.startsWith("Python module")) return 1;
    return names.at(-1) === asked ? 100 - names.length : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
