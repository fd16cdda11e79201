(() => {
  const kept = JSON.parse(document.getElementById("kept").textContent);
  const [who, when, said, example] = ["who", "when", "said", "example"].map((id) => document.getElementById(id));
  const tokens = kept.pieces.map((piece, i) => {
    const token = document.createElement("span");
    token.textContent = piece;
    if (i >= kept.prompt) token.classList.add("made");
    return token;
  });
  example.replaceChildren(...tokens);
  who.replaceChildren(...kept.policies.map((policy, i) => new Option(policy.name, i)));
  const show = () => {
    const { heads, seen, held } = kept.policies[who.value];
    when.max = seen.length - 1;
    const now = held[when.value];
    let sum = 0;
    tokens.forEach((token, i) => {
      const share = (now[i] || 0) / heads;
      sum += share;
      token.style.background = `rgba(var(--keep),${(0.75 * share).toFixed(3)})`;
      token.classList.toggle("later", i >= now.length);
    });
    said.textContent = `${now.length} tokens seen, ${Math.round((100 * sum) / now.length)}% of entries held`;
  };
  who.value = kept.policies.length - 1;
  when.max = kept.policies[0].seen.length - 1;
  when.value = when.max;
  who.addEventListener("input", show);
  when.addEventListener("input", show);
  show();
})();
