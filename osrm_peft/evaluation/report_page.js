"use strict"
for (const table of document.querySelectorAll("table.ranked")) {
  const heads = [...table.tHead.rows[0].cells]
  const rows = () => [...table.tBodies].flatMap(body => [...body.rows]).filter(row => row.dataset.method !== undefined)
  const status = document.createElement("p")
  status.className = "soft"
  status.setAttribute("role", "status")

  const sort = column => {
    const head = heads[column], was = head.getAttribute("aria-sort")
    const down = was ? was === "ascending" : head.classList.contains("number")
    heads.forEach(one => one.removeAttribute("aria-sort"))
    head.setAttribute("aria-sort", down ? "descending" : "ascending")
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim()
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "") // what has no value comes last
      const order = head.classList.contains("number") && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b, "en")
      return down ? -order : order
    }
    for (const body of table.tBodies) {
      const sorted = [...body.rows].filter(row => row.dataset.method !== undefined)
      body.append(...sorted.sort((one, other) => compare(key(one), key(other))))
    }
    status.textContent = `Sorted by ${head.textContent.trim().replace(/\s+/g, " ")}, ${down ? "highest" : "lowest"} first.`
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button")
    button.type = "button"
    button.append(...head.childNodes)
    head.append(button)
    button.addEventListener("click", () => sort(column))
  })

  const controls = document.getElementById(table.dataset.controls)
  if (!controls) continue
  const text = controls.querySelector("input[type=search]")
  const boxes = [...controls.querySelectorAll("input[type=checkbox]")]
  const filter = () => {
    const methods = new Set(boxes.filter(box => box.checked).map(box => box.value))
    const words = text.value.toLowerCase().split(/\s+/)
    const every = rows()
    for (const row of every) {
      const content = row.textContent.toLowerCase()
      row.hidden = !methods.has(row.dataset.method) || !words.every(word => content.includes(word))
    }
    status.textContent = `${every.filter(row => !row.hidden).length} of ${every.length} merges are shown.`
  }
  controls.addEventListener("input", filter)
  controls.querySelector("button").addEventListener("click", () => {
    const all = boxes.every(box => box.checked)
    boxes.forEach(box => { box.checked = !all })
    filter()
  })
  controls.append(status)
  controls.hidden = false
  if (text.value || !boxes.every(box => box.checked)) filter() // what the browser kept of an earlier visit
}
