// A web worker out of a hidden frame, for pages that are read from the disk: browsers start no
// worker from file:// addresses, and the theme's search is one. The theme would fetch a script of
// this kind from the network; mkdocs.yml names this one instead.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = (this.frame = document.createElement("iframe"));
    frame.hidden = true;
    document.body.appendChild(frame);
    const inner = frame.contentWindow;
    // What a worker's script may call, in the frame's own scope.
    inner.postMessage = (data) => {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    };
    const load = (source) =>
      new Promise((resolve, reject) => {
        const script = frame.contentDocument.createElement("script");
        Object.assign(script, { src: source, onload: resolve, onerror: reject });
        frame.contentDocument.body.appendChild(script);
      });
    inner.importScripts = (...sources) =>
      sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
    this.ready = load(url);
  }

  postMessage(data) {
    this.ready.then(() => {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    });
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
