/* Sends the chosen files one by one and puts their answers into the page; without it the form does the same at once. */
"use strict";
(() => {
  const find = id => document.getElementById(id);
  const form = find("ask"), input = find("files"), drop = find("drop"), list = find("list"), status = find("status");
  const progress = find("progress"), button = find("send"), heat = find("heat_map");
  const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
  const MOST_TRIES = 6;

  function answers(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    return [...page.querySelectorAll("li.answer")].map(li => document.importNode(li, true));
  }

  function failed(name, why) {
    const li = document.createElement("li"), title = document.createElement("h3"), line = document.createElement("p");
    li.className = "answer failed";
    title.textContent = name;
    line.className = "says line";
    line.textContent = "no answer: " + why;
    li.append(title, line);
    return [li];
  }

  async function ask(file) {
    for (let tries = 1; ; tries++) {
      const body = new FormData();
      body.append("files", file);
      if (heat && heat.checked) body.append("heat_map", "on");
      let reply;
      try { reply = await fetch("answers", {method: "POST", body}); }
      catch { return failed(file.name, "the server cannot be reached, or the file has changed."); }
      const pause = Number(reply.headers.get("Retry-After"));
      if (!pause || tries === MOST_TRIES || ![429, 503].includes(reply.status)) {
        const got = answers(await reply.text());
        return got.length ? got : failed(file.name, "status " + reply.status + "; load the page again.");
      }
      status.textContent = "The server is busy; " + file.name + " is sent again in " + pause + " seconds.";
      await wait(pause);
    }
  }

  async function send(files) {
    if (!files.length || button.disabled) return;
    button.disabled = true;
    find("answers").classList.remove("empty");
    progress.max = files.length;
    progress.value = 0;
    progress.hidden = files.length < 2;
    let last = "";
    for (const [i, file] of files.entries()) {
      status.textContent = last + "Reading " + file.name + " (" + (i + 1) + " of " + files.length + ").";
      const got = await ask(file);
      list.prepend(...got);
      progress.value = i + 1;
      last = got.map(li => file.name + ": " + li.querySelector(".line").textContent.trim() + " ").join("");
    }
    status.textContent = last + (files.length > 1 ? "All " + files.length + " files are done." : "");
    progress.hidden = true;
    button.disabled = false;
  }

  form.addEventListener("submit", event => {
    event.preventDefault();
    send([...input.files]);
  });
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", event => {
    event.preventDefault();
    send([...event.dataTransfer.files]);
  });
  for (const name of ["dragover", "drop"]) window.addEventListener(name, event => event.preventDefault());
})();
