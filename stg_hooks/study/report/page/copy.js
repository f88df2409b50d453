// Copy the text of `source` when `button` is pressed. Where the browser forbids it, select the text instead.
const copyOnClick = (button, source) => {
  const name = button.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = name; }, 3000);
  });
};
