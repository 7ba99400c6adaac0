// Records camera and microphone while the value, a key, is not empty, and sends what it records with that key.
const EVERY = 200; // ms between two pieces
const FORMATS = ["video/webm;codecs=vp8,opus", "video/webm", "video/mp4"];
let recorder = null;

function stop() {
  if (recorder === null) return;
  const old = recorder;
  recorder = null;
  if (old.state !== "inactive") old.stop();
  old.stream.getTracks().forEach((track) => track.stop());
  element.querySelector("video").srcObject = null;
}

function base64(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.lastIndexOf(",") + 1));
    reader.readAsDataURL(blob);
  });
}

async function start(key) {
  stop();
  try {
    const media = await navigator.mediaDevices.getUserMedia({
      video: { width: { ideal: 320 }, height: { ideal: 240 } },
      audio: true,
    });
    const mine = new MediaRecorder(media, { mimeType: FORMATS.find((format) => MediaRecorder.isTypeSupported(format)) });
    recorder = mine;
    element.querySelector("video").srcObject = media;
    let sent = Promise.resolve(); // one piece after the other
    mine.ondataavailable = (event) => {
      if (event.data.size === 0) return;
      sent = sent.then(async () => {
        const wanted = await server.receive({ key: key, data: await base64(event.data) });
        if (!wanted && recorder === mine) stop();
      });
    };
    mine.start(EVERY);
  } catch (error) {
    await server.receive({ key: key, mistake: `the browser gave no camera and microphone: ${error.message}` });
  }
}

watch("value", () => (props.value ? start(props.value) : stop()));
