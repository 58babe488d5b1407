/* Browsers start no worker from file://. Search then runs in a hidden frame that looks like one. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inner = this.frame.contentWindow
      const load = source => new Promise((resolve, reject) => {
        const script = inner.document.createElement("script")
        Object.assign(script, { src: source, onload: resolve, onerror: reject })
        inner.document.body.appendChild(script)
      })
      /* What the worker posts reaches the page, and the other way round. */
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = (...sources) =>
        sources.reduce((done, source) => done.then(() => load(source)), Promise.resolve())
      this.ready = new Promise(resolve => setTimeout(resolve)).then(() => load(url))
    }
    postMessage(data) {
      this.ready.then(() => {
        const inner = this.frame.contentWindow
        inner.dispatchEvent(new inner.MessageEvent("message", { data }))
      })
    }
    terminate() {
      this.frame.remove()
    }
  }
}
